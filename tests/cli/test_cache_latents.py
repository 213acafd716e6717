"""The latent caching script as users start it, and its flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ltx2_tuner.cli import ltx2_cache_latents as script
from ltx2_tuner.cli.ltx2_cache_latents import build_parser, main
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.media.write import write_video
from tests.caching.latents_world import World

SCRIPT = Path(__file__).parents[2] / "ltx2_cache_latents.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("latents"))
    world.add_clip("a.mp4", 20)
    return world.configure(target_frames=[1, 9])


def test_run_from_another_folder_with_a_worker(world):
    arguments = [str(SCRIPT), *world.arguments("--num_workers", 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=world.folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Auto-detected source FPS: 25.00 for a.mp4" in result.stderr
    assert result.stdout.startswith("[Dataset 0] sources 1 | items 2 | encoded 2 | skipped (existing) 0 | failed 0\n")
    assert world.names() == ["a_00000-001_ltx2", "a_00000-009_ltx2"]


def test_dry_run_needs_no_model(world, capsys):
    assert main(["--dataset_config", str(world.config), "--dry_run", "--num_workers", "0"]) == 0
    output = capsys.readouterr().out
    assert "[Dataset 0] 96x64, 9 frames: 1 items" in output
    assert "expected size of the latent caches: 4.6 kB" in output


def test_debug_previews(world, capsys, monkeypatch):
    fixed = ["--dataset_config", str(world.config), "--num_workers", "0", "--debug_mode"]
    assert main([*fixed, "video"]) == 0
    names = sorted(path.name for path in (world.cache / "debug").iterdir())
    assert names == ["a_00000-001_0096x0064.jpg", "a_00000-009_0096x0064.mp4"]
    capsys.readouterr()
    assert main([*fixed, "console", "--console_width", "40", "--console_num_images", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a_00000-001: 1 frames of 96x64"
    assert [len(line) for line in lines[1:]] == [40] * 13
    assert lines[1].startswith("@" * 19)  # the upper left quarter is white
    assert main([*fixed, "console", "--console_back", "plaid"]) == 1
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main([*fixed, "image"]) == 1
    assert "pip install opencv-python" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ltx2_checkpoint or --vae is needed"),
        (["--ltx2_mode", "av", "--vae", "x"], "--ltx2_mode av needs --ltx2_checkpoint"),
        (["--vae", "x", "--precache_sample_latents"], "needs --sample_prompts"),
        (["--vae", "x", "--ltx2_audio_dir", "x"], "--ltx2_audio_source audio_files"),
        (["--vae", "x", "--vae_dtype", "fp8"], "do not run in fp8"),
        (["--vae", "x", "--batch_size", "0"], "--batch_size must be at least 1 (got 0)"),
        (["--vae", "x", "--vae_spatial_tile_size", "100"], "multiple of 32"),
        (["--vae", "x", "--audio_only_sequence_resolution", "16"], "is 0 or at least 32 (got 16)"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, capsys):
    assert main(["--dataset_config", "absent.toml", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_all_mistakes_are_named_at_once(capsys):
    main(["--dataset_config", "absent.toml", "--batch_size", "0", "--reference_frames", "0"])
    error = capsys.readouterr().err
    assert all(name in error for name in ("--batch_size", "--reference_frames", "--ltx2_checkpoint"))


def test_help_names_every_flag():
    names = """
        --dataset_config --save_dataset_manifest --ltx2_checkpoint --vae --vae_dtype --device --ltx2_mode --ltx_mode
        --ltx2_audio_source --ltx2_audio_dir --ltx2_audio_ext --ltx2_audio_dtype --audio_only_target_resolution
        --audio_only_target_fps --audio_only_sequence_resolution --audio_video_latent_channels
        --audio_video_latent_dtype --vae_chunk_size --vae_spatial_tile_size --vae_spatial_tile_overlap
        --vae_temporal_tile_size --vae_temporal_tile_overlap --reference_frames --reference_downscale
        --precache_sample_latents --sample_prompts --sample_latents_cache --width --height --sample_num_frames
        --batch_size --num_workers --skip_existing --keep_cache --debug_mode --console_width --console_back
        --console_num_images --disable_cudnn_backend --preserve_audio_timing --dry_run --ignore_disk_space --strict
        --help --version
    """
    expected = names.split()
    parser = build_parser()
    assert set(parser.flags()) == set(expected)
    assert all(flag in parser.format_help() for flag in expected)


def test_models_are_opened_before_any_clip(tmp_path, capsys, monkeypatch):
    """A mistyped checkpoint is told at once, not after a look into thousands of clips."""
    monkeypatch.chdir(tmp_path)  # paths of a dataset file are relative to where the script runs
    (tmp_path / "clips").mkdir()
    dataset = tmp_path / "d.toml"
    dataset.write_text(
        "[[datasets]]\nvideo_directory = 'clips'\ncache_directory = 'cache'\nresolution = [64, 64]\n", encoding="utf-8"
    )
    monkeypatch.setattr(script, "scan", lambda *_: pytest.fail("the clips were looked into"))
    assert script.main(["--dataset_config", str(dataset), "--ltx2_checkpoint", str(tmp_path / "no.safetensors")]) == 1
    assert "no.safetensors: no such file" in capsys.readouterr().err


def test_a_file_without_an_autoencoder_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = tmp_path / "lora.safetensors"
    write_safetensors(lora, {"lora_unet_x.lora_down.weight": torch.zeros(1, 2)})
    dataset = tmp_path / "d.toml"
    dataset.write_text(
        "[[datasets]]\nvideo_directory = 'clips'\ncache_directory = 'cache'\nresolution = [64, 64]\n", encoding="utf-8"
    )
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "a.mp4", np.zeros((9, 64, 64, 3), np.uint8), 25)
    (tmp_path / "clips" / "a.txt").write_text("a b c d e", encoding="utf-8")
    flags = ("--dataset_config", dataset, "--ltx2_checkpoint", lora, "--num_workers", 0, "--device", "cpu")
    assert script.main([*map(str, flags)]) == 1
    error = capsys.readouterr().err
    assert "lora.safetensors: has no tensors under vae.encoder." in error and "--vae or --ltx2_checkpoint" in error
