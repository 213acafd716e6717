"""Runs with joint products, which only CUDA has by default, are the runs without them but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.training.acceleration import accelerate
from ltx2_tuner.training.rehearsal import Arrangement
from tests.training.tiny import Clip, train, write_workspace

CLIPS = (Clip(sound=17), Clip(), Clip(sound=12))
SELF_FLOW = ("--self_flow", "--self_flow_args", "student_block_idx=0", "teacher_block_idx=1")
CASES = {
    "streamed": ("--ltx2_mode", "av", "--blocks_to_swap", 1, "--gradient_checkpointing"),
    "fp8": ("--ltx2_mode", "av", "--fp8_base", "--fp8_scaled"),
    "streamed nf4": ("--ltx2_mode", "av", "--nf4_base", "--blocks_to_swap", 1),
    "teacher": SELF_FLOW,
    "teacher, recomputed": (*SELF_FLOW, "--gradient_checkpointing"),
    "preservation, recomputed": ("--ltx2_mode", "av", "--prior_divergence", "--gradient_checkpointing"),
    "accumulated": ("--ltx2_mode", "av", "--gradient_accumulation_steps", 2, "--scale_weight_norms", 0.5),
}


def run(folder: Path, checkpoint: Path, flags: tuple) -> tuple[dict[str, torch.Tensor], list[float], int]:
    """The LoRA, the losses, and the bytes of everything the run left."""
    space = write_workspace(folder, checkpoint, CLIPS)
    recorder = train(space.arguments("--max_train_steps", 5, "--save_state", *flags))
    size = sum(path.stat().st_size for path in space.output.rglob("*.safetensors"))
    return load_file(space.output / "tiny.safetensors"), recorder.values("loss/current"), size


@pytest.mark.parametrize("case", CASES)
def test_joint_products_train_the_same(case: str, tmp_path, checkpoint, monkeypatch) -> None:
    plain, losses, size = run(tmp_path / "plain", checkpoint, CASES[case])

    stacked = []

    def join(arrangement: Arrangement) -> None:
        arrangement.graphs = accelerate(
            arrangement.model, arrangement.network, arrangement.prepared, arrangement.dtype, stays=arrangement.stays
        )
        stacked.extend(group.rows is not None for group in arrangement.model.before_blocks.groups)

    monkeypatch.setattr(Arrangement, "_accelerate", join)
    joined, joined_losses, joined_size = run(tmp_path / "joined", checkpoint, CASES[case])
    assert any(stacked) and joined_losses == pytest.approx(losses, rel=1e-5)
    assert joined.keys() == plain.keys()
    for name, value in plain.items():
        assert (joined[name] - value).norm() <= 1e-4 * value.norm(), name
    assert abs(joined_size - size) < 1000, "a view of a matrix must not be saved with all that lies beside it"
