"""The encoder benchmark runs without a GPU and describes the released encoder."""

from __future__ import annotations

import json

import torch

from benchmarks import vae_encode
from ltx2_tuner.models.video_vae import VideoEncoder


def test_prints_a_line_a_clip(capsys) -> None:
    sizes = ["--width", "64", "--height", "32", "--frames", "1", "9", "--chunk-size", "4"]
    assert vae_encode.main([*sizes, "--repeats", "1", "--device", "cpu", "--tiny"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["frames"] for record in records] == [1, 9]
    for record in records:
        assert record["seconds"] > 0
        assert record["peak_gib"] is None
        assert (record["width"], record["height"], record["chunk_size"]) == (64, 32, 4)


def test_measures_the_released_encoder() -> None:
    with torch.device("meta"):
        encoder = VideoEncoder(vae_encode.encoder_config(tiny=False))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 318_936_897
