"""ltx2_merge_lora.py: files in and out, misuse, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltx2_tuner.cli.ltx2_merge_lora import main
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.files import load_lora, read_tensors
from ltx2_tuner.lora.formats import WRITERS
from tests.lora.test_merging import A, B, C, make, total

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, lora, target="original", dtype=torch.float32) -> Path:
    write_safetensors(path, WRITERS[target](lora.modules, dtype), lora.metadata)
    return path


@pytest.fixture
def inputs(tmp_path):
    loras = [
        make(1, {A: 2, B: 2}, ss_base_model_version="ltx2_v1"),
        make(2, {A: 3, C: 1}, ss_base_model_version="ltx2_v1"),
    ]
    paths = [write(tmp_path / "a ä.safetensors", loras[0]), write(tmp_path / "b.safetensors", loras[1], "comfy")]
    return loras, paths


def test_the_script_merges_mixed_formats(inputs, tmp_path):
    loras, paths = inputs
    output = tmp_path / "out" / "merged.safetensors"
    command = [sys.executable, str(ROOT / "ltx2_merge_lora.py"), "--lora_weight", *map(str, paths)]
    command += ["--lora_multiplier", "1.0", "0.5", "--save_merged_lora", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    merged = load_lora(output)
    assert merged.format == "original" and merged.modules.keys() == {A, B, C}
    for path in merged.modules:
        torch.testing.assert_close(merged.modules[path].delta(), total(loras, (1.0, 0.5), path), rtol=1e-5, atol=1e-4)
    assert merged.metadata["ss_base_model_version"] == "ltx2_v1" and merged.metadata["merge_method"] == "concat"
    assert json.loads(merged.metadata["merge_sources"]) == ["a ä.safetensors", "b.safetensors"]
    tensors, _ = read_tensors(output)
    assert tensors["lora_unet_model_transformer_blocks_0_attn1_to_q.alpha"].item() == 5.0


def test_first_input_decides_the_format(inputs, tmp_path):
    _, paths = inputs
    output = tmp_path / "m.safetensors"
    argv = ["--lora_weight", str(paths[1]), str(paths[0]), "--save_merged_lora", str(output)]
    assert main([*argv, "--dtype", "float16"]) == 0
    tensors, metadata = read_tensors(output)
    assert metadata["merge_format"] == "comfy" and not any("alpha" in key for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert main([*argv, "--emit_alpha"]) == 0
    tensors, _ = read_tensors(output)
    alphas = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == 3 and alphas[f"diffusion_model.{A}.alpha"].item() == 5.0


def test_orthogonal(inputs, tmp_path):
    _, paths = inputs
    output = tmp_path / "m.safetensors"
    argv = ["--lora_weight", *map(str, paths), "--save_merged_lora", str(output), "--merge_method", "orthogonal"]
    assert main([*argv, "--orthogonal_k_fraction", "1", "--orthogonal_rank_mode", "max"]) == 0
    merged = load_lora(output)
    assert merged.modules[A].rank == 3 and merged.metadata["merge_orthogonal_rank_mode"] == "max"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lora_multiplier", "1", "2", "3"], "--lora_multiplier has 3 values for 2 files"),
        (["--orthogonal_k_fraction", "1.5"], "--orthogonal_k_fraction 1.5"),
        (["--save_merged_lora", "a.bin"], "ends in .safetensors"),
    ],
)
def test_misuse(inputs, tmp_path, capsys, extra, message):
    _, paths = inputs
    argv = ["--lora_weight", *map(str, paths), "--save_merged_lora", str(tmp_path / "m.safetensors"), *extra]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "m.safetensors").exists()


def test_flags_of_the_other_method_are_said(inputs, tmp_path, caplog):
    _, paths = inputs
    argv = ["--lora_weight", *map(str, paths), "--save_merged_lora", str(tmp_path / "m.safetensors")]
    assert main([*argv, "--orthogonal_k_fraction", "0.2"]) == 0
    assert "no effect without --merge_method orthogonal" in caplog.text


def test_output_must_not_be_an_input(inputs, capsys):
    _, paths = inputs
    before = paths[0].read_bytes()
    assert main(["--lora_weight", *map(str, paths), "--save_merged_lora", str(paths[0])]) == 1
    assert "is one of the inputs" in capsys.readouterr().err and paths[0].read_bytes() == before


def test_orthogonal_needs_two(inputs, tmp_path, capsys):
    _, paths = inputs
    argv = ["--lora_weight", str(paths[0]), "--save_merged_lora", str(tmp_path / "m.safetensors")]
    assert main([*argv, "--merge_method", "orthogonal"]) == 1
    assert "exactly 2 files, not 1" in capsys.readouterr().err


def test_missing_damaged_and_foreign_files(tmp_path, capsys):
    output = str(tmp_path / "m.safetensors")
    gone = tmp_path / "gone.safetensors"
    assert main(["--lora_weight", str(gone), "--save_merged_lora", output]) == 1
    assert "gone.safetensors: no such file" in capsys.readouterr().err
    gone.write_bytes(b"x" * 100)
    assert main(["--lora_weight", str(gone), "--save_merged_lora", output]) == 1
    assert "no readable safetensors file" in capsys.readouterr().err
    write_safetensors(
        gone, {"lora_unet_foo.lora_down.weight": torch.ones(1, 2), "lora_unet_foo.lora_up.weight": torch.ones(2, 1)}
    )
    assert main(["--lora_weight", str(gone), "--save_merged_lora", output]) == 1
    assert "no layers of LTX-2 (lora_unet_foo)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["--lora_weight", "a", "--save_merged_lora", "b", "--merge_method", "mean"], ["--lora_wieght", "a"]]
)
def test_argument_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
