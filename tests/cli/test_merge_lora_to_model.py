"""ltx2_merge_lora_to_model.py: only the adapted weights change, in every storage form."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ltx2_tuner.cli.ltx2_merge_lora_to_model import main, requantise
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.files import read_tensors
from ltx2_tuner.quantization import fp8
from tests.cli.test_merge_lora import ROOT, write
from tests.lora.test_merging import A, B, make

DIT = "model.diffusion_model."


def checkpoint(path, dtype=torch.float32, **extra):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{DIT}{A}.weight": torch.randn(12, 20, generator=generator).to(dtype),
        f"{DIT}{A}.bias": torch.randn(12, generator=generator),
        f"{DIT}{B}.weight": torch.randn(12, 20, generator=generator).to(dtype),
        f"{DIT}transformer_blocks.0.scale_shift_table": torch.randn(6, 12, generator=generator),
        "vae.encoder.conv_in.conv.weight": torch.randn(2, 2, 1, 1, 1, generator=generator),
        **extra,
    }
    write_safetensors(path, tensors, {"config": "{}", "model_version": "2.3"})
    return tensors


def run(tmp_path, *extra, loras=None):
    loras = loras or [make(1, {A: 2})]
    paths = [write(tmp_path / f"l{i}.safetensors", lora) for i, lora in enumerate(loras)]
    argv = ["--ltx2_checkpoint", str(tmp_path / "base.safetensors"), "--lora_weight", *map(str, paths)]
    return main([*argv, "--save_merged_model", str(tmp_path / "merged.safetensors"), *extra])


def test_only_adapted_weights_change(tmp_path):
    before = checkpoint(tmp_path / "base.safetensors")
    loras = [make(1, {A: 2}), make(2, {A: 3})]
    assert run(tmp_path, "--lora_multiplier", "0.5", "-1", loras=loras) == 0
    after, metadata = read_tensors(tmp_path / "merged.safetensors")
    assert after.keys() == before.keys() and metadata["config"] == "{}"
    assert metadata["merge_sources"] == '["l0.safetensors", "l1.safetensors"]'
    for name, tensor in before.items():
        if name == f"{DIT}{A}.weight":
            expected = tensor + 0.5 * loras[0].modules[A].delta() - loras[1].modules[A].delta()
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after[name], tensor)


def test_files_without_the_prefix_work(tmp_path):
    weight = torch.zeros(12, 20)
    write_safetensors(tmp_path / "base.safetensors", {f"{A}.weight": weight})
    assert run(tmp_path) == 0
    after, _ = read_tensors(tmp_path / "merged.safetensors")
    torch.testing.assert_close(after[f"{A}.weight"], make(1, {A: 2}).modules[A].delta())


@pytest.mark.parametrize("scale_key", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (12, 1), (12, 5, 1)])
def test_fp8_weights_are_quantised_again(tmp_path, scale_key, shape):
    dense = torch.randn(12, 20)
    codes, scale = requantise(dense, torch.ones(shape), torch.float8_e4m3fn)
    assert scale.shape == shape
    error = fp8.dequantise(codes, scale, torch.float32) - dense
    assert error.abs().max() < dense.abs().max() / 16
    extra = {f"{DIT}{A}.weight": codes, f"{DIT}{A}.{scale_key}": scale}
    before = checkpoint(tmp_path / "base.safetensors", **extra)
    assert run(tmp_path) == 0
    after, _ = read_tensors(tmp_path / "merged.safetensors")
    assert all(
        after[name].shape == tensor.shape and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    expected = fp8.dequantise(codes, scale, torch.float32) + make(1, {A: 2}).modules[A].delta()
    merged = fp8.dequantise(after[f"{DIT}{A}.weight"], after[f"{DIT}{A}.{scale_key}"], torch.float32)
    assert (merged - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_fp8_without_scale_stays_a_plain_cast(tmp_path):
    checkpoint(tmp_path / "base.safetensors", torch.float8_e5m2)
    assert run(tmp_path) == 0
    assert read_tensors(tmp_path / "merged.safetensors")[0][f"{DIT}{A}.weight"].dtype == torch.float8_e5m2


def test_misuse(tmp_path, capsys):
    checkpoint(tmp_path / "base.safetensors")
    assert run(tmp_path, loras=[make(1, {"transformer_blocks.9.attn1.to_q": 1})]) == 1
    assert "none of its modules is a layer of" in capsys.readouterr().err
    assert run(tmp_path, loras=[make(1, {A: 1}, size=(3, 20))]) == 1
    assert "for a layer of size 3x20" in capsys.readouterr().err
    assert run(tmp_path, "--lora_multiplier", "1", "2") == 1
    assert "has 2 values for 1 files" in capsys.readouterr().err
    assert run(tmp_path, "--save_merged_model", str(tmp_path / "base.safetensors")) == 1
    assert "is one of the inputs" in capsys.readouterr().err
    assert run(tmp_path, "--device", "tpu9") == 1
    assert "--device tpu9" in capsys.readouterr().err
    write_safetensors(tmp_path / "base.safetensors", {"a": torch.ones(1)}, {"nf4_quantized": "true"})
    assert run(tmp_path) == 1
    assert "is nf4" in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


def test_as_a_script(tmp_path):
    checkpoint(tmp_path / "base.safetensors")
    lora = write(tmp_path / "l.safetensors", make(1, {A: 2}), "comfy")
    output = tmp_path / "m.safetensors"
    command = [sys.executable, str(ROOT / "ltx2_merge_lora_to_model.py"), "--dit", str(tmp_path / "base.safetensors")]
    command += ["--lora_weight", str(lora), "--save_merged_model", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert output.exists()
