"""ltx2_convert_lora.py --scale, and the official trainer's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.cli.ltx2_convert_lora import main
from ltx2_tuner.lora.files import load_lora
from tests.cli.test_merge_lora import write
from tests.lora.test_merging import make

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data"
PATHS = {
    "video": "transformer_blocks.0.attn1.to_q",
    "audio": "transformer_blocks.0.audio_ff.net.2",
    "cross": "transformer_blocks.0.video_to_audio_attn.to_k",
}


@pytest.mark.parametrize("target", ["original", "comfy", "diffusers"])
def test_parts_are_scaled_or_left_out(tmp_path, target):
    lora = make(1, dict.fromkeys(PATHS.values(), 2))
    source, output = write(tmp_path / "in.safetensors", lora), tmp_path / "out.safetensors"
    arguments = ["--input", str(source), "--output", str(output), "--target", target]
    assert main([*arguments, "--scale", "video=0.5", "audio=0", "cross=-1"]) == 0
    found = load_lora(output).modules
    assert found.keys() == {PATHS["video"], PATHS["cross"]}
    torch.testing.assert_close(found[PATHS["video"]].delta(), lora.modules[PATHS["video"]].delta(0.5))
    torch.testing.assert_close(found[PATHS["cross"]].delta(), lora.modules[PATHS["cross"]].delta(-1.0))


@pytest.mark.parametrize("token", ["sound=1", "audio", "audio=x", "audio=nan", "=1"])
def test_what_is_no_scale(tmp_path, capsys, token):
    source = write(tmp_path / "in.safetensors", make(1, {PATHS["video"]: 2}))
    arguments = ["--input", str(source), "--output", str(tmp_path / "o.safetensors"), "--target", "comfy"]
    assert main([*arguments, "--scale", token]) == 1
    assert f"--scale {token}: give video=NUMBER" in capsys.readouterr().err


def test_nothing_left_is_an_error(tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", make(1, {PATHS["video"]: 2}))
    arguments = ["--input", str(source), "--output", str(tmp_path / "o.safetensors"), "--target", "comfy"]
    assert main([*arguments, "--scale", "video=0"]) == 1
    assert "leaves nothing of" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["20", "23"])
@pytest.mark.parametrize("target", ["original", "comfy", "diffusers"])
def test_the_official_trainers_files(tmp_path, version, target):
    official = GOLDEN / f"transformer_{version}" / "lora_official_format.safetensors"
    output = tmp_path / "out.safetensors"
    assert main(["--input", str(official), "--output", str(output), "--target", target]) == 0
    before, after = load_lora(official).modules, load_lora(output)
    assert after.format == target and after.modules.keys() == before.keys()
    for path, module in before.items():
        torch.testing.assert_close(after.modules[path].delta(), module.delta(), rtol=1e-5, atol=1e-6)
