"""A resumed run is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.errors import UserError
from ltx2_tuner.training import state as states
from tests.training.tiny import Clip, Recorder, make_trainer, read_json, train, write_workspace

MIXED = (Clip(sound=17), Clip(), Clip(sound=12), Clip(), Clip(sound=17))


def same_files(first, second, *names: str) -> None:
    for name in names:
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), f"{name}: {key}"


def test_ten_and_ten_steps_are_twenty(tmp_path, checkpoint):
    """Pictures and sound mixed, dropouts on, windows of three with a short one at the end of each epoch (R1)."""
    space = write_workspace(tmp_path, checkpoint, MIXED, batch_size=2)
    flags = [
        *("--ltx2_mode", "av", "--gradient_accumulation_steps", 3, "--max_train_steps", 20, "--save_state"),
        *("--network_dropout", 0.1, "--caption_dropout_rate", 0.3, "--ltx2_first_frame_conditioning_p", 0.5),
        *("--audio_loss_balance_mode", "ema_mag", "--independent_audio_timestep", "--num_timestep_buckets", 4),
        *("--network_args", "rank_dropout=0.1", "module_dropout=0.1"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--optimizer_args", "weight_decay=0.01"),
        *("--audio_silence_regularizer", "--save_every_n_steps", 10),
    ]
    whole = train(space.arguments(*flags, "--output_dir", tmp_path / "whole"))
    middle = tmp_path / "whole" / "tiny-step00000010-state"
    rest = train(space.arguments(*flags, "--output_dir", tmp_path / "rest", "--resume", middle))
    for name in ("loss/current", "loss/video", "grad_norm/total", "lr/unet", "loss/average", "loss/audio_video_ratio"):
        expected = [metrics.get(name) for metrics in whole.steps if metrics["step"] > 10 and "loss/current" in metrics]
        found = [metrics.get(name) for metrics in rest.steps if "loss/current" in metrics]
        assert found == expected, name
        assert len(found) == 10
    files = ("network.safetensors", "optimizer.safetensors", "random.safetensors")
    same_files(tmp_path / "whole" / "tiny-state", tmp_path / "rest" / "tiny-state", *files)
    first, second = (read_json(tmp_path / name / "tiny-state" / "resume_metadata.json") for name in ("whole", "rest"))
    assert first == second


def test_loader_processes_start_before_training_and_where_the_run_goes_on(tmp_path, checkpoint):
    """In the middle of an epoch, and at its end."""
    space = write_workspace(tmp_path, checkpoint, [Clip()] * 3)
    flags = ["--save_state", "--save_every_n_steps", 1, "--max_train_steps", 5]
    expected = train(space.arguments(*flags)).values("loss/current")
    for step in (2, 3):
        before = set(multiprocessing.active_children())
        more = ["--resume", space.output / f"tiny-step0000000{step}-state", "--max_data_loader_n_workers", 1]
        recorder = Recorder()
        trainer = make_trainer(space.arguments(*flags, *more, "--output_dir", tmp_path / f"rest{step}"), recorder)
        started = set(multiprocessing.active_children()) - before
        assert started
        trainer.train()
        assert set(multiprocessing.active_children()) - before == started  # the same ones for all epochs
        assert recorder.values("loss/current") == expected[step:]


def test_autoresume_takes_the_newest_complete_state_of_this_name(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    flags = ["--save_state", "--save_every_n_steps", 2]
    train(space.arguments(*flags))
    output = space.output
    shutil.copytree(output / "tiny-step00000002-state", output / "other-step00000099-state")
    shutil.copytree(output / "tiny-state", output / "tiny-step00000050-state")
    (output / "tiny-step00000050-state" / states.MANIFEST).unlink()
    assert states.newest_state(output, "tiny").name == "tiny-state"
    trainer = make_trainer(space.arguments(*flags, "--autoresume", "--max_train_steps", 6))
    assert trainer.progress.step == 4


def test_autoresume_passes_over_a_damaged_state(tmp_path, checkpoint, caplog):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state", "--save_every_n_steps", 2, "--max_train_steps", 6))
    for name in ("tiny-state", "tiny-step00000006-state"):
        path = space.output / name / "network.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert make_trainer(space.arguments("--autoresume", "--max_train_steps", 6)).progress.step == 4
    assert caplog.text.count("network.safetensors: missing or not what the state's manifest lists") == 2


def test_autoresume_without_a_state_starts_from_scratch(tmp_path, checkpoint, caplog):
    space = write_workspace(tmp_path, checkpoint)
    with caplog.at_level("INFO"):
        assert make_trainer(space.arguments("--autoresume")).progress.step == 0
    assert "starting from scratch" in caplog.text


def test_a_state_of_another_rank_is_refused(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state"))
    with pytest.raises(UserError, match="rank was 4 there and is 8 now"):
        make_trainer(space.arguments("--resume", space.output / "tiny-state", "--network_dim", 8))


def test_a_longer_run_goes_on_with_a_warning(tmp_path, checkpoint, caplog):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state"))
    trainer = make_trainer(space.arguments("--resume", space.output / "tiny-state", "--max_train_steps", 6))
    assert "max_train_steps was 4" in caplog.text
    trainer.train()
    assert trainer.progress.step == 6


def test_a_state_of_another_optimizer_is_refused(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state"))
    with pytest.raises(UserError, match=r"optimizer was torch.optim.AdamW there and is torch.optim.SGD now"):
        make_trainer(space.arguments("--resume", space.output / "tiny-state", "--optimizer_type", "SGD"))
    assert make_trainer(space.arguments("--resume", space.output / "tiny-state", "--optimizer_type", "adamw"))


@pytest.mark.parametrize(("scheduler", "shares"), [("constant", (1, 1)), ("linear", (0.5, 0.375))])
def test_another_learning_rate_is_used_from_where_the_schedule_stands(tmp_path, checkpoint, caplog, scheduler, shares):
    space = write_workspace(tmp_path, checkpoint)
    flags = ("--save_state", "--save_every_n_steps", 4, "--max_train_steps", 8, "--lr_scheduler", scheduler)
    train(space.arguments(*flags))
    state = space.output / "tiny-step00000004-state"
    found = train(space.arguments(*flags, "--resume", state, "--learning_rate", 1e-4)).values("lr/unet")
    assert found[:2] == pytest.approx([1e-4 * share for share in shares])
    assert "learning_rate was 0.001 when the state was saved and is 0.0001 now" in caplog.text


def test_moments_follow_their_parameters_into_other_groups(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, MIXED)
    train(space.arguments("--ltx2_mode", "av", "--save_state"))
    flags = ("--ltx2_mode", "av", "--audio_lr", 1e-4, "--network_args", "loraplus_lr_ratio=4")
    trainer = make_trainer(space.arguments(*flags, "--resume", space.output / "tiny-state", "--max_train_steps", 6))
    assert [group["lr"] for group in trainer.run.optimizer.param_groups] == pytest.approx([1e-3, 4e-3, 1e-4, 4e-4])
    before = make_trainer(space.arguments("--ltx2_mode", "av", "--resume", space.output / "tiny-state"))
    old = dict(zip(before.run.gradients.names, before.run.gradients.parameters))
    for name, parameter in zip(trainer.run.gradients.names, trainer.run.gradients.parameters):
        mine, theirs = trainer.run.optimizer.state[parameter], before.run.optimizer.state[old[name]]
        assert mine and all(torch.equal(mine[key], theirs[key]) for key in theirs), name
    trainer.train()


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("schedulefree", "schedulefree.AdamWScheduleFree"),
        ("prodigyopt", "Prodigy"),
        ("prodigyplus", "prodigyplus.ProdigyPlusScheduleFree"),
        ("came_pytorch", "CAME"),
        ("lion_pytorch", "Lion"),
        ("bitsandbytes", "PagedAdamW8bit"),
        ("transformers", "Adafactor"),
        ("torch", "Muon"),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_optimizer_resumes_bit_for_bit(tmp_path, checkpoint, package, name):
    pytest.importorskip(package)
    same_after_resume(tmp_path, checkpoint, name)


@pytest.mark.parametrize("flags", [(), ("--full_fp16", "--optimizer_args", "eps=1e-4")])
def test_half_precision_resumes_bit_for_bit(tmp_path, checkpoint, flags):
    same_after_resume(tmp_path, checkpoint, "AdamW", "--mixed_precision", "fp16", *flags)
    state = read_json(tmp_path / "whole" / "tiny-state" / "resume_metadata.json")
    assert state["scaler"] == read_json(tmp_path / "output" / "tiny-state" / "resume_metadata.json")["scaler"] != {}


def same_after_resume(tmp_path, checkpoint, optimizer: str, *more: object) -> None:
    """Six steps, and three and three, end in the same adapter and optimizer."""
    space = write_workspace(tmp_path, checkpoint)
    flags = ("--optimizer_type", optimizer, "--save_state", "--save_every_n_steps", 3, "--max_train_steps", 6, *more)
    train(space.arguments(*flags))
    state = tmp_path / "state"
    shutil.move(space.output / "tiny-step00000003-state", state)
    whole = shutil.move(space.output, tmp_path / "whole")
    train(space.arguments(*flags, "--resume", state))
    same_files(whole / "tiny-state", space.output / "tiny-state", "network.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("kind", ["missing", "lora", "no manifest", "cut", "changed", "bad json"])
def test_what_is_no_complete_state_is_refused(tmp_path, checkpoint, kind):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state"))
    folder = space.output / "tiny-state"
    expected = "state"
    if kind == "missing":
        folder, expected = tmp_path / "nowhere", "no such directory"
    elif kind == "lora":
        folder, expected = space.output / "tiny.safetensors", "--network_weights"
    elif kind == "no manifest":
        (folder / states.MANIFEST).unlink()
    elif kind == "cut":
        data = (folder / "optimizer.safetensors").read_bytes()
        (folder / "optimizer.safetensors").write_bytes(data[: len(data) // 2])
        expected = "optimizer.safetensors"
    elif kind == "changed":
        path = folder / "network.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        expected = "network.safetensors"
    else:
        (folder / states.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=expected):
        make_trainer(space.arguments("--resume", folder))


def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state"))
    path = space.output / "tiny-state" / states.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["../tiny.safetensors"] = manifest["files"].pop("network.safetensors")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest"):
        make_trainer(space.arguments("--resume", space.output / "tiny-state"))


def test_an_interrupted_write_leaves_no_state(tmp_path, checkpoint, monkeypatch):
    space = write_workspace(tmp_path, checkpoint)
    real = states.files.write_json

    def stop(path, value):
        if path.name == states.MANIFEST:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(states.files, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        train(space.arguments("--save_state"))
    assert not [path for path in space.output.iterdir() if path.is_dir()]
    assert states.newest_state(space.output, "tiny") is None
