"""Names, formats, metadata and rotation of saved files."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from ltx2_tuner.training.options import SaveOptions
from ltx2_tuner.training.saving import CheckpointWriter, Moment, model_hashes, rotate_state
from tests.training.tiny import Clip, read_json, train, write_workspace


def adapter() -> dict[str, torch.Tensor]:
    name = "lora_unet_model_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.randn(2, 6),
        f"{name}.lora_up.weight": torch.randn(4, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_names_of_a_run(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, [Clip()] * 3)
    train(
        space.arguments(
            *("--max_train_steps", 6, "--save_every_n_steps", 4, "--save_every_n_epochs", 1),
            *("--save_state", "--save_checkpoint_metadata"),
        )
    )
    stems = ["tiny-step00000004", "tiny-000001", "tiny"]
    expected = {f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".comfy.safetensors", ".json")}
    assert files_of(space.output) == expected | {f"{stem}-state" for stem in stems}
    sidecar = read_json(space.output / "tiny-step00000004.json")
    assert (sidecar["step"], sidecar["epoch"]) == (4, 2)
    assert {"loss", "loss_avg", "lr", "loss_video", "timestamp"} <= sidecar.keys()
    assert "loss_audio" not in sidecar


def test_metadata_of_a_saved_adapter(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    flags = ["--network_alpha", 2, "--training_comment", "hello", "--metadata_author", "me", "--min_timestep", 100]
    train(space.arguments(*flags))
    found = metadata_of(space.output / "tiny.safetensors")
    expected = {
        "ss_base_model_version": "ltx2_v1",
        "ss_network_module": "networks.lora_ltx2",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_ltx_version": "2.3",
        "ss_ltx2_mode": "video",
        "ss_seed": "7",
        "ss_steps": "4",
        "ss_sd_model_name": "tiny.safetensors",
        "ss_training_comment": "hello",
        "ss_audio_lr": "None",
        "ss_shifted_logit_mode": "stretched",
        "modelspec.architecture": "LTX2/lora",
        "modelspec.title": "tiny",
        "modelspec.author": "me",
        "modelspec.timestep_range": "100,1000",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert json.loads(found["ss_datasets"])[0]["items"] == 3
    assert not any(str(tmp_path) in value for value in found.values())
    comfy = metadata_of(space.output / "tiny.comfy.safetensors")
    assert comfy["ss_network_dim"] == "4" and comfy["sshs_model_hash"] != found["sshs_model_hash"]


def test_without_metadata_only_what_loaders_need_is_kept(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--no_metadata"))
    found = {key for key in metadata_of(space.output / "tiny.safetensors") if key.startswith("ss_")}
    assert found == {"ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}


def test_hashes_are_those_of_a_serialisation_with_ss_metadata():
    tensors = {"b": torch.randn(700, 700), "a": torch.arange(5)}
    metadata = {"ss_x": "1", "modelspec.title": "t"}
    data = save(tensors, {"ss_x": "1"})
    length = struct.unpack("<Q", data[:8])[0]
    found = model_hashes(tensors, metadata)
    # The library may lay tensors out in another order; ours is by name.
    body = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    assert found["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert len(data) - 8 - length == len(body)
    assert len(found["sshs_legacy_hash"]) == 8


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"comfy": False}, {"x.safetensors"}),
        ({"original": False}, {"x.comfy.safetensors"}),
        ({}, {"x.safetensors", "x.comfy.safetensors"}),
    ],
)
def test_which_copies_are_written(tmp_path, flags, names):
    CheckpointWriter(SaveOptions(tmp_path, "x", **flags)).save(Moment("final", 1, 1), adapter(), {}, {})
    assert files_of(tmp_path) == names


def test_foreign_adapters_keep_the_original_even_when_only_comfy_was_asked_for(tmp_path):
    tensors = {"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}
    CheckpointWriter(SaveOptions(tmp_path, "x", original=False)).save(Moment("final", 1, 1), tensors, {}, {})
    assert files_of(tmp_path) == {"x.safetensors"}


def test_saved_precision(tmp_path):
    CheckpointWriter(SaveOptions(tmp_path, "x", precision="bf16")).save(Moment("final", 1, 1), adapter(), {}, {})
    for name in files_of(tmp_path):
        with safe_open(tmp_path / name, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_step_rotation(tmp_path):
    """Every 10 steps, the last 30 are kept, and states by their own rule."""
    options = SaveOptions(tmp_path, "x", every_steps=10, last_steps=30, last_steps_state=10, comfy=False)
    writer = CheckpointWriter(options)
    kept, states = [], []
    for step in range(10, 90, 10):
        moment = Moment("step", step, 1)
        writer.save(moment, adapter(), {}, {})
        (tmp_path / f"{moment.stem('x')}-state").mkdir()
        rotate_state(moment, options, None)
        kept.append(sorted(int(path.stem[-8:]) for path in tmp_path.glob("*.safetensors")))
        states.append(sorted(int(path.name[6:14]) for path in tmp_path.glob("*-state")))
    assert kept[-1] == [50, 60, 70, 80]
    assert kept[3] == [10, 20, 30, 40] and kept[4] == [20, 30, 40, 50]
    assert states[-1] == [70, 80] and states[1] == [10, 20]


def test_epoch_rotation(tmp_path):
    options = SaveOptions(tmp_path, "x", every_epochs=2, last_epochs=2)
    writer = CheckpointWriter(options)
    for epoch in (2, 4, 6, 8):
        writer.save(Moment("epoch", epoch, epoch), adapter(), {}, {})
    assert files_of(tmp_path) == {
        f"x-00000{epoch}{end}" for epoch in (6, 8) for end in (".safetensors", ".comfy.safetensors")
    }


def test_the_state_resumed_from_is_never_removed(tmp_path):
    options = SaveOptions(tmp_path, "x", every_steps=10, last_steps=0)
    source = tmp_path / "x-step00000010-state"
    source.mkdir()
    rotate_state(Moment("step", 20, 1), options, source)
    assert source.is_dir()
    rotate_state(Moment("step", 20, 1), options, None)
    assert not source.exists()
