"""Each parameter of CREPA and Self-Flow changes what a run computes, or, where it is to save memory, does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx2_tuner.training.regularizers import CrepaOptions, SelfFlowOptions
from ltx2_tuner.training.regularizers.options import keys_of
from tests.training.tiny import Workspace, train, write_checkpoint, write_workspace

FRAME = ("temporal_mode=frame", "lambda_temporal=0.1")
PATCH = (*FRAME, "temporal_granularity=patch", "patch_spatial_radius=1")
SOFT = (*PATCH, "patch_match_mode=soft")
DELTA = ("temporal_mode=delta", "lambda_delta=0.1")
MOVING = (*FRAME, "motion_weighting=teacher_delta", "motion_weight_strength=0.7")
EMA = ("teacher_mode=ema", "teacher_momentum=0.5")
DECAY = ("temporal_schedule=linear", "temporal_max_steps=5")
MASK = ("mask_ratio=0.4",)
DINO = ("mode=dino", "dino_model=dinov2_vits14")

# key -> (settings that it needs, settings that differ)
CREPA = {
    "mode": ((), DINO),
    "student_block_idx": ((), ("student_block_idx=0",)),
    "teacher_block_idx": ((), ("teacher_block_idx=4",)),
    "lambda_crepa": ((), ("lambda_crepa=0.2",)),
    "tau": ((), ("tau=0.5",)),
    "num_neighbors": ((), ("num_neighbors=1",)),
    "schedule": (("max_steps=4",), ("schedule=cosine",)),
    "warmup_steps": ((), ("warmup_steps=2",)),
    "max_steps": (("schedule=linear",), ("max_steps=8",)),
    "normalize": ((), ("normalize=false",)),
}
SELF_FLOW = {
    "teacher_mode": ((), ("teacher_mode=ema", "teacher_momentum=0.1")),
    "student_block_idx": ((), ("student_block_idx=0",)),
    "teacher_block_idx": ((), ("teacher_block_idx=4",)),
    "student_block_ratio": ((), ("student_block_ratio=0.5",)),
    "teacher_block_ratio": ((), ("teacher_block_ratio=0.7",)),
    "student_block_stochastic_range": ((), ("student_block_stochastic_range=2",)),
    "lambda_self_flow": ((), ("lambda_self_flow=0.2",)),
    "mask_ratio": ((), MASK),
    "frame_level_mask": (MASK, ("frame_level_mask=true",)),
    "mask_focus_loss": (MASK, ("mask_focus_loss=true",)),
    "max_loss": ((), ("max_loss=1e-5",)),
    "temporal_mode": (FRAME, ("temporal_mode=hybrid", "lambda_delta=0.1")),
    "lambda_temporal": (FRAME, ("lambda_temporal=0.2",)),
    "lambda_delta": (DELTA, ("lambda_delta=0.2",)),
    "temporal_tau": (FRAME, ("temporal_tau=0.5",)),
    "num_neighbors": (FRAME, ("num_neighbors=1",)),
    "temporal_granularity": (FRAME, ("temporal_granularity=patch",)),
    "patch_spatial_radius": (PATCH, ("patch_spatial_radius=0",)),
    "patch_match_mode": (PATCH, ("patch_match_mode=soft",)),
    "patch_match_temperature": (SOFT, ("patch_match_temperature=0.5",)),
    "delta_num_steps": (DELTA, ("delta_num_steps=2",)),
    "motion_weighting": (MOVING, ("motion_weighting=none",)),
    "motion_weight_strength": (MOVING, ("motion_weight_strength=3",)),
    "temporal_schedule": (DECAY, ("temporal_schedule=cosine",)),
    "temporal_warmup_steps": ((), ("temporal_warmup_steps=2",)),
    "temporal_max_steps": (DECAY, ("temporal_max_steps=9",)),
    "teacher_momentum": (EMA, ("teacher_momentum=0.9",)),
    "teacher_update_interval": (EMA, ("teacher_update_interval=2",)),
    "projector_hidden_multiplier": ((), ("projector_hidden_multiplier=2",)),
    "projector_lr": ((), ("projector_lr=0.1",)),
    "loss_type": ((), ("loss_type=one_minus_cosine",)),
    "dual_timestep": (MASK, ("dual_timestep=false",)),
    "tokenwise_timestep": (MASK, ("tokenwise_timestep=false",)),
}
SAVES_MEMORY = {
    "offload_teacher_features": (FRAME, ("offload_teacher_features=true",)),
    "offload_teacher_params": (EMA, ("offload_teacher_params=true",)),
}
CASES = [("crepa", key) for key in CREPA] + [("self_flow", key) for key in {**SELF_FLOW, **SAVES_MEMORY}]


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    """A model of five blocks and clips of three frames with DINO features."""
    folder = tmp_path_factory.mktemp("five")
    space = write_workspace(folder, write_checkpoint(folder / "five.safetensors", layers=5))
    for path in (folder / "datasets").glob("*-017_*_ltx2.safetensors"):
        generator = torch.Generator().manual_seed(1)
        features = {"dino_features": torch.randn(17, 16, 384, generator=generator).half()}
        save_file(features, path.with_name(f"{path.stem}_dino.safetensors"), {"dino_model": "dinov2_vits14"})
    return space


def losses(space: Workspace, output: Path, technique: str, settings: tuple[str, ...]) -> list[list[float]]:
    """What four steps log of a technique, and of everything."""
    options = dict(setting.split("=") for setting in ("student_block_idx=1", "teacher_block_idx=3", *settings))
    found = train(
        space.arguments(
            f"--{technique}", f"--{technique}_args", *(f"{key}={value}" for key, value in options.items()),
            *("--output_dir", output, "--learning_rate", 1e-2),
        )
    )  # fmt: skip
    return [found.values(f"loss/{technique}"), found.values("loss/current")]


@pytest.mark.parametrize(("technique", "key"), CASES)
def test_a_parameter_does_something(space, tmp_path, technique, key):
    needs, differs = (CREPA if technique == "crepa" else {**SELF_FLOW, **SAVES_MEMORY})[key]
    plain = losses(space, tmp_path / "plain", technique, needs)
    other = losses(space, tmp_path / "other", technique, (*needs, *differs))
    assert (plain == other) == (key in SAVES_MEMORY)


def test_no_parameter_is_forgotten():
    """`dino_model` has to be that of the cache: test_dino_mode_reads_what_was_cached."""
    assert set(CREPA) | {"dino_model"} == set(keys_of(CrepaOptions))
    assert set(SELF_FLOW) | set(SAVES_MEMORY) == set(keys_of(SelfFlowOptions))
