"""lora_post_hoc_ema.py from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltx2_tuner.cli.lora_post_hoc_ema import main
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.files import read_tensors
from ltx2_tuner.training.saving import model_hashes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoints(tmp_path) -> list[Path]:
    """Three checkpoints of one run; the middle one was written last."""
    paths = [tmp_path / f"lora ß{index}.safetensors" for index in range(3)]
    for index, path in enumerate(paths):
        name = "lora_unet_model_transformer_blocks_0_attn1_to_q"
        tensors = {f"{name}.lora_down.weight": torch.full((2, 4), float(index)), f"{name}.alpha": torch.tensor(2.0)}
        tensors[f"{name}.lora_up.weight"] = torch.full((4, 2), float(index))
        write_safetensors(path, tensors, {"ss_steps": str(index), "sshs_model_hash": "old"})
        os.utime(path, (index, 9 if index == 1 else index))
    return paths


def value(path: Path) -> float:
    return read_tensors(path)[0]["lora_unet_model_transformer_blocks_0_attn1_to_q.lora_down.weight"][0, 0].item()


def test_files_are_taken_in_the_order_they_were_written(checkpoints, tmp_path):
    output = tmp_path / "ema.safetensors"
    command = [sys.executable, str(ROOT / "lora_post_hoc_ema.py"), *map(str, reversed(checkpoints))]
    done = subprocess.run([*command, "--output_file", str(output), "--beta", "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert value(output) == 0.5 * (0.5 * 0 + 0.5 * 2) + 0.5 * 1
    tensors, metadata = read_tensors(output)
    assert metadata["ss_steps"] == "1"
    assert metadata["sshs_model_hash"] == model_hashes(tensors, metadata)["sshs_model_hash"] != "old"


def test_or_in_the_order_given(checkpoints, tmp_path):
    output = tmp_path / "ema.safetensors"
    assert main([*map(str, checkpoints), "--output_file", str(output), "--beta", "0.5", "--no_sort"]) == 0
    assert value(output) == 0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 2


@pytest.mark.parametrize(
    ("count", "flags", "expected"),
    [
        (1, (), "alone has no average"),
        (2, ("--beta", "1.5"), "--beta 1.5"),
        (2, ("--sigma_rel", "0.5"), "--sigma_rel 0.5"),
    ],
)
def test_misuse(checkpoints, tmp_path, capsys, count, flags, expected):
    arguments = [*map(str, checkpoints[:count]), "--output_file", str(tmp_path / "e.safetensors"), *flags]
    assert main(arguments) == 1
    assert expected in capsys.readouterr().err


def test_the_output_is_no_input(checkpoints, capsys):
    assert main([*map(str, checkpoints), "--output_file", str(checkpoints[0])]) == 1
    assert "is one of the inputs" in capsys.readouterr().err
