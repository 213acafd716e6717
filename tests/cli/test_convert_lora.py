"""ltx2_convert_lora.py: every format to every other, dtypes, misuse."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch

from ltx2_tuner.cli.ltx2_convert_lora import main
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.files import load_lora, read_tensors
from ltx2_tuner.lora.formats import FORMATS
from tests.cli.test_merge_lora import ROOT, write
from tests.lora.test_merging import A, B, make


@pytest.mark.parametrize(("source", "target"), product(FORMATS, FORMATS))
def test_every_way_keeps_the_deltas(source, target, tmp_path):
    lora = make(1, {A: 2, B: 3, "transformer_blocks.7.audio_ff.net.0.proj": 1}, ss_seed="7")
    path, output = write(tmp_path / "in.safetensors", lora, source), tmp_path / "out.safetensors"
    assert main(["--input", str(path), "--output", str(output), "--target", target]) == 0
    found = load_lora(output)
    assert found.format == target and found.metadata["ss_seed"] == "7"
    assert found.modules.keys() == lora.modules.keys()
    for name, module in lora.modules.items():
        torch.testing.assert_close(found.modules[name].delta(), module.delta(), rtol=1e-5, atol=1e-5)
        if source == "original" == target:
            assert found.modules[name].alpha == module.alpha


@pytest.mark.parametrize(("word", "target"), [("default", "original"), ("other", "comfy")])
def test_upstreams_words(word, target, tmp_path):
    path, output = write(tmp_path / "in.safetensors", make(1, {A: 2})), tmp_path / "out.safetensors"
    assert main(["--input", str(path), "--output", str(output), "--target", word]) == 0
    assert load_lora(output).format == target


def test_dtypes(tmp_path):
    path = write(tmp_path / "in.safetensors", make(1, {A: 2}), dtype=torch.bfloat16)
    output = tmp_path / "out.safetensors"
    for flag, dtype in (("auto", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        assert main(["--input", str(path), "--output", str(output), "--target", "comfy", "--dtype", flag]) == 0
        assert {tensor.dtype for tensor in read_tensors(output)[0].values()} == {dtype}


def test_the_comfy_file_gets_the_plain_reference_factor(tmp_path):
    path = write(tmp_path / "in.safetensors", make(1, {A: 2}, ss_reference_downscale_factor="2"))
    output = tmp_path / "out.safetensors"
    assert main(["--input", str(path), "--output", str(output), "--target", "comfy"]) == 0
    assert read_tensors(output)[1]["reference_downscale_factor"] == "2"


def test_as_a_script(tmp_path):
    path = write(tmp_path / "mit leer ß.safetensors", make(1, {A: 2}))
    output = tmp_path / "neu.safetensors"
    command = [sys.executable, str(ROOT / "ltx2_convert_lora.py"), "--input", str(path), "--output", str(output)]
    result = subprocess.run([*command, "--target", "diffusers"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"transformer.{A}.lora_A.weight" in read_tensors(output)[0]
    result = subprocess.run([*command, "--target", "comfyui"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "comfyui" in result.stderr


def test_misuse(tmp_path, capsys):
    path = write(tmp_path / "in.safetensors", make(1, {A: 2}))
    before = path.read_bytes()
    assert main(["--input", str(path), "--output", str(path), "--target", "comfy"]) == 1
    assert "is one of the inputs" in capsys.readouterr().err and path.read_bytes() == before
    write_safetensors(path, {"diffusion_model.transformer_blocks.0.attn1.to_q.lokr_w1": torch.ones(2, 2)})
    assert main(["--input", str(path), "--output", str(tmp_path / "o.safetensors"), "--target", "original"]) == 1
    assert "made by another network module" in capsys.readouterr().err
