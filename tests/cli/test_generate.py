"""ltx2_generate_video.py as a user runs it, on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ltx2_tuner.checkpoint import Checkpoint, load_transformer, write_tiny_checkpoint
from ltx2_tuner.cli.ltx2_generate_video import main
from ltx2_tuner.lora import LoRANetwork, Targets, save_comfy, save_original, select_layers
from ltx2_tuner.text_encoding import write_tiny_gemma

ROOT = Path(__file__).resolve().parents[2]
SIZE = ("--width", "64", "--height", "64", "--frame_count", "9", "--sample_steps", "2", "--seed", "3")
EXACT = ("--mixed_precision", "no", "--vae_dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modèles à part")
    write_tiny_checkpoint(folder / "tiny 2.3.safetensors", version="2.3", seed=0)
    write_tiny_gemma(folder / "gemma", seed=0)
    return folder


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments) -> Result:
    """The script in this process: starting Python and torch would take longer than what is tested."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return Result(status, out.getvalue(), err.getvalue())


def generate(models, output, *arguments, check=True):
    shared = ("--ltx2_checkpoint", models / "tiny 2.3.safetensors", "--gemma_root", models / "gemma")
    result = run(*shared, "--output_dir", output, *EXACT, *SIZE, *arguments)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def latents(models, output, *arguments):
    """The latents of one run."""
    generate(models, output, "--prompt", "a cat", "--output_type", "latent", *arguments)
    return load_file(next(output.glob("*_latent.safetensors")))


def test_picture_and_sound_have_one_length(models, tmp_path):
    arguments = ("--ltx2_mode", "av", "--prompt", "a cat", "--sample_merge_audio", "--fps", "24")
    result = generate(models, tmp_path, *arguments)
    files = {path.name.split("_")[-1] for path in tmp_path.iterdir()}
    assert any(name == "av.mp4" for name in files), files
    assert all(line in map(str, tmp_path.iterdir()) for line in result.stdout.split("\n") if line)
    with av.open(str(next(tmp_path.glob("*_av.mp4")))) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.frames, video.average_rate, audio.rate) == (9, 24, 48000)
        seconds = float(audio.duration * audio.time_base)
        assert abs(seconds - 9 / 24) < 0.03


def test_sound_alone(models, tmp_path):
    generate(models, tmp_path, "--ltx2_mode", "audio", "--prompt", "a cat", "--no-sample_audio_subprocess")
    assert [path.suffix for path in tmp_path.iterdir()] == [".wav"]


def test_the_first_frame_image_stays(models, tmp_path):
    picture = tmp_path / "bild ü.png"
    Image.new("RGB", (80, 70), (200, 30, 60)).save(picture)
    free = latents(models, tmp_path / "free")
    held = latents(models, tmp_path / "held", "--image_path", picture)
    unmasked = latents(models, tmp_path / "unmasked", "--image_path", picture, "--no-sample_i2v_token_timestep_mask")
    assert torch.equal(held["video"][:, :, :1], unmasked["video"][:, :, :1])
    assert not torch.equal(held["video"][:, :, :1], free["video"][:, :, :1])
    assert not torch.equal(held["video"][:, :, 1:], unmasked["video"][:, :, 1:])


@pytest.mark.parametrize("save", [save_original, save_comfy])
def test_a_lora_counts_with_its_strength(models, tmp_path, save):
    checkpoint = Checkpoint.open(models / "tiny 2.3.safetensors")
    model = load_transformer(checkpoint, "video", torch.device("cpu"), torch.float32)
    network = LoRANetwork(select_layers(model, Targets("video", "t2v")), 4, 8.0)
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.1)
    lora = tmp_path / "lora.safetensors"
    save(lora, network.matrices(), {}, torch.float32)
    base = latents(models, tmp_path / "base")
    off = latents(models, tmp_path / "off", "--lora_weight", lora, "--lora_multiplier", "0")
    on = latents(models, tmp_path / "on", "--lora_weight", lora)
    halves = latents(models, tmp_path / "halves", "--lora_weight", lora, lora, "--lora_multiplier", "0.5")
    assert torch.equal(base["video"], off["video"])
    assert not torch.allclose(base["video"], on["video"], atol=1e-3)
    torch.testing.assert_close(on["video"], halves["video"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (("--blocks_to_swap", "1"), 0.0),
        (("--split_attn_target", "all", "--split_attn_mode", "query", "--split_attn_chunk_size", "3"), 1e-4),
        (("--ffn_chunk_target", "all", "--ffn_chunk_size", "3"), 1e-4),
        (("--attn_mode", "torch"), 0.0),
        (("--fp8_base", "--fp8_scaled"), 1.0),
        (("--nf4_base", "--nf4_block_size", "16"), 3.0),
    ],
)
def test_memory_flags_change_little(models, tmp_path, flags, tolerance):
    plain = latents(models, tmp_path / "plain")["video"]
    other = latents(models, tmp_path / "other", *flags)["video"]
    difference = (plain - other).abs().max().item()
    assert difference <= tolerance
    if tolerance >= 1.0:
        assert difference > 1e-4, "the weights were not quantised"


def test_saved_latents_decode_to_the_same_clip(models, tmp_path, monkeypatch):
    written = []  # before the encoder, which makes much of a last bit
    monkeypatch.setattr(
        "ltx2_tuner.sampling.preview.write_video", lambda path, frames, *_, **__: written.append(np.asarray(frames))
    )
    generate(models, tmp_path / "a", "--prompt", "a cat", "--output_type", "both")
    saved = next((tmp_path / "a").glob("*_latent.safetensors"))
    shared = ("--ltx2_checkpoint", models / "tiny 2.3.safetensors", "--output_dir", tmp_path / "b", *EXACT)
    assert run(*shared, "--latent_path", saved).returncode == 0
    made, decoded = (frames.astype(int) for frames in written)
    assert made.shape == decoded.shape == (9, 64, 64, 3)
    # The last bit of a convolution depends on where its buffers lie: few levels may round the other way.
    assert np.abs(made - decoded).max() <= 1
    assert (made != decoded).mean() < 0.01


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        ((), 1, ["one of --prompt, --sample_prompts"]),
        (("--prompt", "x", "--promt", "y"), 2, ["unknown flag --promt", "did you mean --prompt?"]),
        (("--prompt", "x", "--max_train_steps", "3"), 2, ["belongs to ltx2_train_network.py"]),
        (("--prompt", "x", "--lora_weight", "none.safetensors"), 1, ["none.safetensors", "no such file"]),
        (("--prompt", "x", "--lora_multiplier", "1", "2"), 1, ["--lora_multiplier"]),
        (("--prompt", "x", "--sample_audio_only"), 1, ["--sample_audio_only needs --ltx2_mode av or audio"]),
        (("--prompt", "x", "--sample_tiled_vae", "--sample_vae_tile_size", "70"), 1, ["multiple of 32"]),
        (("--prompt", "x", "--loftq_init"), 1, ["training only"]),
        (("--prompt", "x", "--fp8_base", "--nf4_base"), 1, ["choose one of --fp8_base and --nf4_base"]),
        (("--prompt", "x", "--blocks_to_swap", "99"), 1, ["blocks_to_swap"]),
        (("--sample_prompts", "nothing.txt"), 1, ["nothing.txt", "no such file"]),
    ],
)
def test_mistakes_get_one_sentence(models, tmp_path, arguments, status, parts):
    result = generate(models, tmp_path, *arguments, check=False)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_as_a_script(models, tmp_path):
    command = [sys.executable, ROOT / "ltx2_generate_video.py", "--ltx2_checkpoint", models / "tiny 2.3.safetensors"]
    command += ["--gemma_root", models / "gemma", "--output_dir", tmp_path, *EXACT, *SIZE, "--prompt", "a cat"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) in tmp_path.iterdir()


def test_a_missing_image_makes_nothing_and_fails(models, tmp_path):
    result = generate(models, tmp_path / "out", "--prompt", "x", "--image_path", tmp_path / "no.png", check=False)
    assert result.returncode == 1 and not (tmp_path / "out").exists()


def test_a_file_without_the_model_says_so(models, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 2)}, lora)
    result = generate(models, tmp_path / "out", "--prompt", "x", "--ltx2_checkpoint", lora, check=False)
    assert result.returncode == 1
    assert "lora.safetensors: has no tensors under vae.decoder." in result.stderr
    vae = ("--vae", models / "tiny 2.3.safetensors")
    result = generate(models, tmp_path / "out", "--prompt", "x", "--ltx2_checkpoint", lora, *vae, check=False)
    assert "lora.safetensors: has no tensors under model.diffusion_model." in result.stderr
