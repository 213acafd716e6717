"""The caching benchmark runs the real script without a GPU, on few and small clips."""

from __future__ import annotations

import json

from benchmarks import cache_latents
from ltx2_tuner.checkpoint import Checkpoint, load_video_encoder


def test_prints_the_rate_of_the_script(capsys) -> None:
    small = ["--clips", "3", "--size", "64", "96", "--frames", "20", "--target_frames", "17", "--tiny"]
    assert cache_latents.main([*small, "--", "--device", "cpu", "--num_workers", "1"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["clips"] == 3 and line["clips_per_sec"] > 0 and line["frames"] == 17
    assert line["peak_gpu"] is None and line["host_peak_gib"] > 0.05


def test_a_failure_of_the_script_shows(capsys) -> None:
    small = ["--clips", "1", "--size", "64", "96", "--frames", "9", "--target_frames", "9", "--tiny"]
    assert cache_latents.main([*small, "--", "--vae_spatial_tile_size", "33"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["clips_per_sec"] is None and "tile size is 33" in shown.err


def test_the_encoder_is_a_file_that_the_loader_takes(tmp_path) -> None:
    cache_latents.write_encoder(tmp_path / "encoder.safetensors", tiny=True)
    checkpoint = Checkpoint.open(tmp_path / "encoder.safetensors")
    encoder = load_video_encoder(checkpoint, "cpu", cache_latents.torch.bfloat16)
    checkpoint.close()
    assert encoder.config.latent_channels == 8
