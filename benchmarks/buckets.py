"""What a change of shape costs: seconds of the first steps of each bucket, and of a step when it runs.

One process goes from bucket to bucket, with nothing compiled before. One JSON line a bucket: `first_sec` is its first
step, which compiles, `ready_sec` all until its pass is recorded, `sec` the median of six steps after that.

python benchmarks/buckets.py --buckets 49x512x768 33x512x768 49x768x512
python benchmarks/buckets.py -- --dynamic auto --precision fp8
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks import train_step
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.devices import exact

Bucket = tuple[int, int, int]  # frames, height, width
BUCKETS = ["49x512x768", "33x512x768", "49x768x512", "25x704x704"]


def bucket(text: str) -> Bucket:
    """FRAMESxHEIGHTxWIDTH."""
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def measure(buckets: list[Bucket], flags: list[str]) -> Iterator[dict[str, object]]:
    """A line for each bucket, in turn.

    Args:
        flags: of train_step.py.
    """
    first, *_ = buckets
    args = train_step.parse_arguments([*_shape(first), *flags])
    device = exact(args.device)
    step = train_step.Step(args, device)
    for number, (frames, height, width) in enumerate(buckets):
        args = train_step.parse_arguments([*_shape((frames, height, width)), *flags])
        step.take(args, device)
        times = []
        for _ in range(train_step.WARM_UP):
            start = time.perf_counter()
            step().item()
            times.append(time.perf_counter() - start)
        yield {
            "bucket": number,
            "frames": frames,
            "size": [height, width],
            "tokens": {name: target.shape[1] for name, target in step.targets.items()},
            "dynamic": args.dynamic,
            "precision": args.precision,
            "recompute": args.recompute,
            "layers": args.layers,
            "compiled": step.plan.compiled,
            "recordings": len(step.graphs.recordings) if step.graphs else 0,
            "first_sec": round(times[0], 2),
            "ready_sec": round(sum(times), 2),
            "sec": round(train_step.measure(step, device, train_step.WARM_UP), 4),
            "peak_gib": train_step.peak_gib(device),
            "gpu": train_step.gpu_name(device),
            "torch": torch.__version__,
        }


def _shape(chosen: Bucket) -> list[str]:
    frames, height, width = map(str, chosen)
    return ["--frames", frames, "--size", height, width]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=bucket, nargs="+", default=[bucket(text) for text in BUCKETS])
    parser.add_argument("more", nargs="*", help="flags of train_step.py, after --")
    args = parser.parse_args(argv)
    keep_memory_in_one_piece()  # as the trainer does
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is compiled yet
        for line in measure(args.buckets, args.more):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
