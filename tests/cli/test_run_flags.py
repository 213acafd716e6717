"""Flags of a run's optimizer, schedule, files and logs, from the command line to what they change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ltx2_tuner.cli.ltx2_merge_lora_to_model import main as merge_into_model
from ltx2_tuner.cli.ltx2_train_network import main
from ltx2_tuner.training.run_log import read_log
from tests.training.tiny import Workspace, write_checkpoint, write_workspace


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture
def space(tmp_path, checkpoint) -> Workspace:
    return write_workspace(tmp_path, checkpoint)


def column(space: Workspace, name: str, output: Path | None = None) -> list[float]:
    """What a run logged under a name, step by step."""
    return [row[name] for row in read_log((output or space.output) / "tiny.log.csv") if name in row]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        (["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2], [0, 0.5, 1, 1]),
        (["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "50%"], [0, 0.5, 1, 1]),
        (["--lr_scheduler", "polynomial", "--lr_scheduler_power", 2], [1, 0.5625, 0.25, 0.0625]),
        (["--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", 2], [1, 0.5, 1, 0.5]),
        (["--lr_scheduler", "inverse_sqrt", "--lr_scheduler_timescale", 1], [1, 0.5**0.5, 3**-0.5, 0.5]),
        (["--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio", 0.5], [1, 0.926777, 0.75, 0.573223]),
        (["--lr_scheduler", "warmup_stable_decay", "--lr_decay_steps", 2], [1, 1, 1, 0.5]),
        (["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:2,0.1"], [1, 1, 0.1, 0.1]),
        (
            [
                "--lr_scheduler_type",
                "torch.optim.lr_scheduler.StepLR",
                "--lr_scheduler_args",
                "step_size=1",
                "gamma=.5",
            ],
            [1, 0.5, 0.25, 0.125],
        ),
    ],
)
def test_schedules(space, flags, shares):
    assert main(space.arguments(*flags)) == 0
    assert column(space, "lr/unet") == pytest.approx([1e-3 * share for share in shares], rel=2e-3, abs=1e-9)


def test_epochs_override_steps(space):
    assert main(space.arguments("--max_train_epochs", 2)) == 0
    assert len(column(space, "loss/current")) == 6, "3 batches an epoch"


def test_clipping_and_the_limit_of_norms(space):
    """One SGD step of rate 1 moves by the clipped gradient; the other flag then shortens the product."""
    flags = ("--optimizer_type", "SGD", "--learning_rate", 1, "--max_train_steps", 1)
    moved = {}
    for norm in (0, 1e-3):
        assert main(space.arguments(*flags, "--max_grad_norm", norm)) == 0
        ups = [value for name, value in load_file(space.output / "tiny.safetensors").items() if "lora_up" in name]
        moved[norm] = torch.cat([up.flatten() for up in ups]).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3) and moved[0] > 2e-3
    assert main(space.arguments(*flags, "--max_grad_norm", 0, "--scale_weight_norms", 0.05)) == 0
    assert max(column(space, "max_norm/keys_scaled")) > 0
    tensors = load_file(space.output / "tiny.safetensors")
    for name in {key.split(".")[0] for key in tensors}:
        product = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        assert product.norm() <= 0.05 * 1.0001, name


@pytest.mark.parametrize(("short", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_adapters_are_trained_and_saved_as_they_are(space, short, dtype):
    flags = (f"--full_{short}", "--mixed_precision", short, "--optimizer_args", "eps=1e-4")
    assert main(space.arguments(*flags)) == 0
    tensors = load_file(space.output / "tiny.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name} == {dtype}
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


def test_lycoris_takes_its_own_files_alone(space, capsys, caplog):
    pytest.importorskip("lycoris")
    flags = ("--network_module", "lycoris.kohya", "--network_args", "algo=locon")
    assert main(space.arguments(*flags)) == 0
    assert "reported to be unstable" in caplog.text
    own = space.output / "tiny.safetensors"
    more = ("--output_name", "more", "--network_weights", own)
    assert main(space.arguments(*flags, *more)) == 0
    assert main(space.arguments("--output_name", "lora")) == 0
    assert main(space.arguments(*flags, "--network_weights", space.output / "lora.comfy.safetensors")) == 1
    assert "belongs to this lycoris.kohya network" in capsys.readouterr().err


def test_base_weights_train_as_on_the_merged_model(tmp_path, space, checkpoint):
    assert main(space.arguments("--output_name", "style", "--learning_rate", 0.05)) == 0
    style, merged = space.output / "style.safetensors", tmp_path / "merged.safetensors"
    command = ["--ltx2_checkpoint", checkpoint, "--lora_weight", style, "--lora_multiplier", 0.5]
    assert merge_into_model([*map(str, command), "--save_merged_model", str(merged)]) == 0
    losses = {}
    for name, flags in {
        "plain": (),
        "merged": ("--ltx2_checkpoint", merged),
        "based": ("--base_weights", style, "--base_weights_multiplier", 0.5),
    }.items():
        assert main(space.arguments("--output_dir", tmp_path / name, *flags)) == 0
        losses[name] = column(space, "loss/current", tmp_path / name)
    assert losses["based"] == pytest.approx(losses["merged"], rel=1e-5)
    assert losses["based"] != pytest.approx(losses["plain"], rel=1e-3)
    assert "style" in metadata_of(tmp_path / "based" / "tiny.safetensors")["ss_base_weights"]


def test_a_run_starts_from_either_form_of_an_adapter(tmp_path, space):
    """A ComfyUI file cannot resume, but nobody has to train again because of that (T19)."""
    assert main(space.arguments("--learning_rate", 0.05)) == 0
    first = {}
    for form in ("tiny.safetensors", "tiny.comfy.safetensors", None):
        flags = ("--network_weights", space.output / form) if form else ()
        assert main(space.arguments("--output_dir", tmp_path / "again", *flags)) == 0
        first[form] = column(space, "loss/current", tmp_path / "again")[0]
    assert first["tiny.comfy.safetensors"] == pytest.approx(first["tiny.safetensors"], rel=1e-6)
    assert first["tiny.safetensors"] != pytest.approx(first[None], rel=1e-3)


def test_epochs_rotate_with_their_copies_and_states(space):
    flags = ("--max_train_epochs", 5, "--save_every_n_epochs", 1, "--save_state", "--save_checkpoint_metadata")
    assert main(space.arguments(*flags, "--save_last_n_epochs", 2, "--save_last_n_epochs_state", 1)) == 0
    kept = {path.name for path in space.output.iterdir() if path.name.startswith("tiny-")}
    files = {
        f"tiny-{epoch:06d}{ending}" for epoch in (3, 4) for ending in (".safetensors", ".comfy.safetensors", ".json")
    }
    assert kept == files | {"tiny-000004-state", "tiny-state"}


def test_what_a_file_says_about_itself(space):
    typed = {"title": "Fox", "author": "A", "description": "D", "license": "CC0", "tags": "a,b", "reso": "64x64"}
    flags = [word for name, value in typed.items() for word in (f"--metadata_{name}", value)]
    assert main(space.arguments(*flags, "--metadata_arch", "mine", "--training_comment", "hello")) == 0
    found = metadata_of(space.output / "tiny.safetensors")
    names = {**{name: name for name in typed}, "reso": "resolution"}
    assert {name: found[f"modelspec.{names[name]}"] for name in typed} == typed
    assert found["modelspec.architecture"] == "mine" and found["ss_training_comment"] == "hello"
    assert main(space.arguments("--no_metadata", "--training_comment", "hello")) == 0
    assert "ss_training_comment" not in metadata_of(space.output / "tiny.safetensors")


def test_names_and_flags_in_the_tracker(tmp_path, space):
    logs = tmp_path / "logs"
    flags = ("--log_tracker_name", "foxes", "--log_config", "--log_timestep_distribution_interval", 0)
    assert main(space.arguments("--logging_dir", logs, *flags, "--huggingface_token", "hf_secret")) == 0
    (folder,) = logs.glob("*/foxes")
    events = EventAccumulator(str(folder)).Reload()
    assert not events.Tags()["histograms"]
    (text,) = events.Tensors("config/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| network_dim | 4 |" in table and "hf_secret" not in table and str(tmp_path) not in table


def test_the_state_at_the_end_alone(space):
    assert main(space.arguments("--save_state_on_train_end", "--save_every_n_steps", 2)) == 0
    assert [path.name for path in space.output.glob("*-state")] == ["tiny-state"]
    assert json.loads((space.output / "tiny-state" / "state_manifest.json").read_text())["state_type"] == "final"


@pytest.mark.parametrize("kept", ["--persistent_data_loader_workers", "--no-persistent_data_loader_workers"])
def test_loader_processes_change_nothing(tmp_path, space, kept):
    flags = ("--max_data_loader_n_workers", 2, kept, "--max_train_epochs", 2)
    assert main(space.arguments(*flags)) == 0
    assert main(space.arguments("--max_train_epochs", 2, "--output_dir", tmp_path / "plain")) == 0
    assert column(space, "loss/current") == column(space, "loss/current", tmp_path / "plain")
