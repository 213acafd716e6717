"""With an optimizer that drops steps by itself, the next batch begins before the host knows how a step went."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx2_tuner.devices import Arriving, send
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.state import METADATA, newest_state
from ltx2_tuner.training.window import Fetch
from tests.training.poison import poisoned_trainer
from tests.training.ranks import run_ranks
from tests.training.tiny import Clip, Recorder, Workspace, make_trainer, write_workspace

FUSED = ("--optimizer_type", "AdamW", "--optimizer_args", "fused=True")
CLIPS = [Clip(sound=17), Clip(), Clip(sound=12), Clip(sound=17), Clip(), Clip()]


@pytest.fixture
def space(tmp_path, checkpoint) -> Workspace:
    return write_workspace(tmp_path, checkpoint, CLIPS, validation=[Clip(sound=17)])


def order_of(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`batch`, `step` and `read`, as the trainer begins a micro-batch, begins a step and reads how it went."""
    order: list[str] = []
    learn, values = trainer._learn, Fetch.values
    monkeypatch.setattr(trainer, "_learn", lambda *a: order.append("batch") or learn(*a))
    trainer.run.optimizer.register_step_pre_hook(lambda *a: order.append("step"))
    monkeypatch.setattr(Fetch, "values", lambda fetch: order.append("read") or values(fetch))
    trainer.train()
    return order


def test_a_batch_begins_before_the_step_before_is_read(space, monkeypatch):
    trainer = make_trainer(space.arguments(*FUSED, "--max_train_steps", 3))
    order = order_of(trainer, monkeypatch)
    assert order == ["batch", "step", "batch", "read", "step", "batch", "read", "step", "read"]


def test_an_optimizer_that_cannot_drop_steps_waits(space, monkeypatch):
    trainer = make_trainer(space.arguments("--max_train_steps", 3))
    assert order_of(trainer, monkeypatch) == ["batch", "read", "step"] * 3


@pytest.mark.parametrize(
    "flags",
    [
        ("--save_every_n_steps", 1),
        ("--validate_every_n_steps", 1),
        ("--scale_weight_norms", 1.0),
        ("--self_flow", "--self_flow_args", "student_block_idx=0", "teacher_block_idx=1"),
    ],
    ids=lambda flags: flags[0],
)
def test_what_the_host_does_between_steps_has_it_wait(space, monkeypatch, flags):
    trainer = make_trainer(space.arguments(*FUSED, "--max_train_steps", 3, *flags))
    assert order_of(trainer, monkeypatch) == ["batch", "step", "read"] * 3


def test_previews_have_it_wait(space, monkeypatch):
    """The recordings in whose memory gradients lie are released before them."""
    prompts = space.root / "prompts.txt"
    prompts.write_text("a cat", encoding="utf-8")
    flags = ("--sample_every_n_steps", 1, "--sample_prompts", prompts, "--gemma_root", space.root)
    sampler = SimpleNamespace(sample=lambda *_, **__: None)
    trainer = make_trainer(space.arguments(*FUSED, "--max_train_steps", 3, *flags), sampler=sampler)
    assert order_of(trainer, monkeypatch) == ["batch", "step", "read"] * 3


@pytest.mark.parametrize(
    ("places", "flags"),
    [
        (set(), ()),
        ({1, 2, 7}, ()),
        ({2}, ("--gradient_accumulation_steps", 2)),
        ({3}, ("--audio_loss_balance_mode", "ema_mag")),
    ],
    ids=["good", "bad batches", "accumulation", "balanced"],
)
def test_it_changes_nothing_but_the_time(space, monkeypatch, places, flags):
    """Every number of the log, the adapters, and the states saved on the way."""
    given = (*FUSED, "--ltx2_mode", "av", "--max_train_steps", 11, "--save_every_n_steps", 4, "--save_state", *flags)
    given += ("--lr_scheduler", "linear", "--validate_every_n_steps", 5, "--audio_supervision_mode", "warn")
    found = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Trainer, "_may_run_ahead", lambda trainer, stop: False)
        trainer, recorder = poisoned_trainer(space, places, *given)
        trainer.train()
        assert trainer.run.guard.dropped == len(places)
        found.append((_without_times(recorder), _saved(space.output)))
    (log, files), (expected_log, expected) = found
    assert log == expected_log and len(log) >= 11
    assert files.keys() == expected.keys() and any("state" in name for name in files)
    for name, value in expected.items():
        assert torch.equal(files[name], value) if isinstance(value, torch.Tensor) else files[name] == value, name


@pytest.mark.parametrize("bad", [False, True])
def test_an_error_does_not_lose_the_step_before(space, bad):
    """That step is logged; or it was the one at fault, and is what the run ends with."""
    flags = ("--max_train_steps", 5, "--nan_check", "error")
    trainer, recorder = poisoned_trainer(space, {1} if bad else set(), *FUSED, *flags)
    trainer.run.data.unreadable = 2
    with pytest.raises(UserError, match="not finite in a step" if bad else "a damaged cache"):
        trainer.train()
    assert trainer.progress.step == len(recorder.values("loss/current")) == (1 if bad else 2)


def test_waiting_for_data_is_part_of_the_step_it_is_logged_with(space):
    """A batch is waited for before the step before is counted."""
    trainer, recorder = poisoned_trainer(space, set(), *FUSED, "--max_train_steps", 4)
    batches = type(trainer.run.data).__iter__

    class Slow(type(trainer.run.data)):
        def __iter__(self):
            for place, batch in enumerate(batches(self)):
                time.sleep(0.5 if place == 2 else 0)
                yield batch

    trainer.run.data.__class__ = Slow
    trainer.train()
    waits, seconds = recorder.values("perf/data_wait_seconds"), recorder.values("perf/step_seconds")
    assert sum(wait >= 0.5 for wait in waits) == 1
    assert all(wait <= step for wait, step in zip(waits, seconds, strict=True))


def _without_times(recorder: Recorder) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if "perf/" not in name} for step in recorder.steps]


def _saved(folder: Path) -> dict[str, object]:
    """Every tensor below a folder, and what its states say of where they are; the folder is emptied."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": tensor for key, tensor in load_file(path).items()}
        elif path.name == METADATA:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C on Windows")
@pytest.mark.parametrize("moment", ["prepare", "values"])
def test_a_stop_loses_nothing(space, monkeypatch, moment):
    """Asked for while a batch begins or while a step is read, a run goes on where it was."""
    flags = (*FUSED, "--ltx2_mode", "av", "--max_train_steps", 5, "--save_state", "--lr_scheduler", "linear")
    whole = Recorder()
    make_trainer(space.arguments(*flags), whole).train()
    expected = _saved(space.output)
    first = Recorder()
    trainer = make_trainer(space.arguments(*flags), first)
    place, name = (trainer.run.mode, "prepare") if moment == "prepare" else (Fetch, "values")
    original, calls = getattr(place, name), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    # While a batch begins, the step before is not read yet: one more. While one is read, another batch has begun.
    assert trainer.progress.step == trainer.progress.micro_batches == (2 if moment == "prepare" else 3)
    state = newest_state(space.output, "tiny")
    second = Recorder()
    make_trainer(space.arguments(*flags, "--resume", state), second).train()
    assert first.values("loss/current") + second.values("loss/current") == whole.values("loss/current")
    assert first.values("lr/unet") + second.values("lr/unet") == whole.values("lr/unet")
    found = _saved(space.output)
    for name in [name for name in expected if name.startswith("tiny.safetensors")]:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C on Windows")
def test_processes_stop_together_though_one_was_asked(tmp_path, checkpoint):
    """Rank 1 hears Ctrl-C; neither waits for the other in a reduction that never comes, and both count the same."""
    space = write_workspace(tmp_path, checkpoint, CLIPS * 2)
    arguments = space.arguments(*FUSED, "--ltx2_mode", "av", "--max_train_steps", 6)
    for done in run_ranks(["-m", "tests.training.test_running_ahead", tmp_path, *arguments]):
        assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first["steps"].tolist() == second["steps"].tolist() and 2 <= first["steps"][0] <= 4


def test_values_go_to_a_device_and_back():
    values = torch.arange(3)
    assert send(values, "cpu") is values
    assert send(values, torch.device("cpu"), torch.float64).dtype == torch.float64
    assert send(values, "meta", torch.bfloat16).device.type == "meta"
    assert torch.equal(Arriving(values).wait(), values)


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    trainer = make_trainer(sys.argv[2:])
    prepare, calls = trainer.run.mode.prepare, []

    def prepared(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return prepare(*arguments)

    trainer.run.mode.prepare = prepared
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    steps = torch.tensor([trainer.progress.step, trainer.progress.micro_batches])
    save_file({"steps": steps}, Path(sys.argv[1]) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()
