"""Clips a second of ltx2_cache_latents.py itself, on rendered clips and a random encoder of full size (2.3, bf16).

    python benchmarks/cache_latents.py                                   # 24 clips of 57 frames, 768x512, H.264
    python benchmarks/cache_latents.py --clips 3 --size 64 64 --tiny     # a small one, for a machine without a GPU

The rate is that between the first and the last file written, which leaves start-up out. `gpu_busy` is the mean share of
time in which the GPU worked over the same span, as NVML samples it. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch

from benchmarks.processes import run_watched
from benchmarks.vae_encode import encoder_section
from ltx2_tuner.data.cache_names import LATENT_SUFFIX
from ltx2_tuner.files import write_safetensors, write_text
from ltx2_tuner.media.write import write_video
from ltx2_tuner.models.video_vae import VideoEncoder, VideoVAEConfig

SCRIPT = Path(__file__).resolve().parent.parent / "ltx2_cache_latents.py"
FPS = 25
INTERVAL = 0.1  # seconds between looks at the GPU
DATASET = """\
[[datasets]]
video_directory = '{clips}'
cache_directory = '{cache}'
resolution = [{width}, {height}]
target_frames = [{target}]
frame_extraction = "head"
target_fps = {fps}
"""


def render(number: int, folder: Path, size: tuple[int, int], frames: int) -> None:
    """A clip of drifting colours under grain, so that the decoder has as much to do as with a filmed one."""
    height, width = size
    draws = np.random.default_rng(number)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = draws.uniform(20, 90, 3).astype(np.float32)
    grain = draws.normal(0, 6, (height + frames, width, 3)).astype(np.float32)

    def picture(index: int) -> np.ndarray:
        colours = [np.sin((rows + columns + 4 * index) / wave) for wave in waves]
        return (128 + 90 * np.stack(colours, axis=-1) + grain[index : index + height]).clip(0, 255).astype(np.uint8)

    write_video(folder / f"clip {number:03d}.mp4", map(picture, range(frames)), FPS)
    write_text(folder / f"clip {number:03d}.txt", f"Colours that drift, number {number}.\n")


def write_encoder(path: Path, tiny: bool) -> None:
    """The video encoder with random weights, under the names and with the config of the released file."""
    section = encoder_section(tiny)
    torch.manual_seed(0)
    encoder = VideoEncoder(VideoVAEConfig.from_dict(section)).to(torch.bfloat16)
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        inner = name if name.startswith("per_channel_statistics.") else f"encoder.{name}"
        tensors[f"vae.{inner}"] = tensor
    write_safetensors(path, tensors, {"config": json.dumps({"vae": section}), "format": "pt"})


class GpuWatch(threading.Thread):
    """Samples how busy the first GPU is: (time, share of 1). Nothing where there is no NVML."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        with contextlib.suppress(Exception):  # no package, no driver or no GPU, each an error of its own
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            while True:
                share = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                self.samples.append((time.time(), share))
                time.sleep(INTERVAL)

    def mean(self, start: float, end: float) -> float | None:
        """Mean share between two times."""
        shares = [share for moment, share in self.samples if start <= moment <= end]
        return round(statistics.mean(shares), 3) if shares else None


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Render the clips, run the script, look at what it wrote."""
    clips, cache = folder / "clips", folder / "cache"
    clips.mkdir()
    draw = functools.partial(render, folder=clips, size=tuple(args.size), frames=args.frames)
    with multiprocessing.get_context("spawn").Pool(min(args.clips, os.cpu_count() or 1)) as pool:
        pool.map(draw, range(args.clips))
    write_encoder(folder / "encoder.safetensors", args.tiny)
    sizes = {"width": args.size[1], "height": args.size[0], "target": args.target_frames, "fps": float(FPS)}
    write_text(folder / "data.toml", DATASET.format(clips=clips.as_posix(), cache=cache.as_posix(), **sizes))
    flags = ["--dataset_config", str(folder / "data.toml"), "--ltx2_checkpoint", str(folder / "encoder.safetensors")]
    gpu = GpuWatch()
    outcome = run_watched([sys.executable, str(SCRIPT), *flags, *args.flags])
    if outcome.status:
        sys.stderr.write(outcome.error_text[-4000:])
    times = sorted(path.stat().st_mtime for path in cache.glob(f"*{LATENT_SUFFIX}"))
    span = times[-1] - times[0] if len(times) > 1 else None
    peak = re.search(r"peak GPU memory ([\d.]+ \w+)", outcome.output)
    return {
        "benchmark": "cache_latents",
        "clips": len(times),
        "size": list(args.size),
        "frames": args.target_frames,
        "clips_per_sec": round((len(times) - 1) / span, 2) if span else None,
        "gpu_busy": gpu.mean(times[0], times[-1]) if span else None,
        "peak_gpu": peak[1] if peak else None,
        **outcome.memory(),
        "total_sec": round(outcome.seconds, 2),
        "status": outcome.status,
        "flags": args.flags,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=57, help="of a clip")
    parser.add_argument("--target_frames", type=int, default=49, help="of which are encoded")
    parser.add_argument("--tiny", action="store_true", help="an encoder of eight channels")
    parser.add_argument("flags", nargs="*", help="further flags of ltx2_cache_latents.py, after --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        line = measure(Path(folder), args)
    print(json.dumps(line), flush=True)
    return int(bool(line["status"]))


if __name__ == "__main__":
    raise SystemExit(main())
