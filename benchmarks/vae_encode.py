#!/usr/bin/env python3
"""Seconds and peak device memory of encoding one clip with the full-size 2.3 video encoder, random weights, bf16.

    python benchmarks/vae_encode.py                          # 768x512, 49 and 121 frames, on the GPU
    python benchmarks/vae_encode.py --frames 121 --chunk-size 16 --tile-size 512

Prints one JSON line a clip. Weights do not change the time, so no checkpoint is needed. `--tiny` takes an encoder of
eight channels, for a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from ltx2_tuner.models.video_vae import VideoEncoder, VideoVAEConfig
from ltx2_tuner.models.video_vae.tiling import TileConfig, encode

# The block list of the released 2.3 file: layers of each residual stage, then what follows it.
STAGES = (
    (4, "compress_space_res", 2),
    (6, "compress_time_res", 2),
    (4, "compress_all_res", 2),
    (2, "compress_all_res", 1),
    (2, None, 1),
)


def encoder_section(tiny: bool) -> dict[str, Any]:
    """The config's `vae` section of the 2.3 encoder; tiny: eight channels and one layer a stage."""
    blocks: list[list[Any]] = []
    for layers, resampling, multiplier in STAGES:
        blocks.append(["res_x", {"num_layers": 1 if tiny else layers}])
        if resampling:
            blocks.append([resampling, {"multiplier": multiplier}])
    return {"latent_channels": 8 if tiny else 128, "encoder_blocks": blocks}


def encoder_config(tiny: bool) -> VideoVAEConfig:
    """The encoder's config as the model takes it."""
    return VideoVAEConfig.from_dict(encoder_section(tiny))


def measure(encoder: VideoEncoder, pixels: torch.Tensor, tiles: TileConfig, repeats: int) -> tuple[float, float | None]:
    """Seconds of the fastest of `repeats` encodings after one to warm up, and peak GiB (None on a CPU)."""
    on_gpu = next(encoder.parameters()).is_cuda
    seconds = []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        encode(encoder, pixels, tiles)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each number of frames."""
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    with torch.device(options.device):
        encoder = VideoEncoder(encoder_config(options.tiny)).to(dtype).requires_grad_(False).eval()
    tiles = TileConfig.for_encoding(
        spatial_size=options.tile_size, temporal_size=options.temporal_tile_size, chunk_size=options.chunk_size
    )
    name = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else options.device
    for frames in options.frames:
        pixels = torch.randint(0, 256, (1, 3, frames, options.height, options.width), dtype=torch.uint8)
        seconds, gib = measure(encoder, pixels, tiles, options.repeats)
        yield {
            "benchmark": "vae_encode",
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
            "width": options.width,
            "height": options.height,
            "frames": frames,
            "chunk_size": options.chunk_size,
            "tile_size": options.tile_size,
            "temporal_tile_size": options.temporal_tile_size,
            "seconds": round(seconds, 4),
            "peak_gib": None if gib is None else round(gib, 3),
            "dtype": options.dtype,
            "device": name,
            "torch": torch.__version__,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768, help="pixels")
    parser.add_argument("--height", type=int, default=512, help="pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=[49, 121])
    parser.add_argument("--chunk-size", type=int, help="frames a convolution takes at a time")
    parser.add_argument("--tile-size", type=int, help="pixels of a spatial tile")
    parser.add_argument("--temporal-tile-size", type=int, help="frames of a temporal tile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="an encoder of eight channels")
    for record in run(parser.parse_args(argv)):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
