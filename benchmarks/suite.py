"""The rows of docs/benchmarks.md that one GPU measures, each in a process of its own, one on each GPU at a time.

Rows begin in the order of the table below. What a row prints goes to FOLDER as it comes, and all lines to the screen at
the end; a row that cannot begin before the time is over is left out. Compilations are shared by the rows of a GPU.

python benchmarks/suite.py out --minutes 9
python benchmarks/suite.py out --rows fp8_streamed frontier_fp8
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
LOW = ["--lora_dtype", "bfloat16", "--recompute", "full"]
ROWS = {
    "fp8_streamed": ["train_step.py", "--precision", "fp8", "--blocks_to_swap", "42", *LOW],
    "fp8_streamed_less": ["train_step.py", "--precision", "fp8", "--blocks_to_swap", "38", *LOW],
    "bf16": ["train_step.py"],
    "nf4_streamed": ["train_step.py", "--precision", "nf4", "--blocks_to_swap", "47", "--ring", "6", *LOW],
    "bf16_recomputed": ["train_step.py", "--recompute", "full"],
    "fp8_products": ["train_step.py", "--precision", "fp8_compute"],
    "gradients": ["gradients.py", "--layers", "2"],
    "gradients_fp8_products": ["gradients.py", "--layers", "2", "--precision", "fp8_compute", "--against", "bf16"],
    "frontier_fp8": ["frontier.py", "--precisions", "fp8"],
    "frontier_nf4": ["frontier.py", "--precisions", "nf4"],
    "frontier_bf16": ["frontier.py", "--precisions", "bf16"],
}


def command(name: str, more: list[str]) -> list[str]:
    """What runs a row; `more` flags of train_step.py come last."""
    script, *flags = ROWS[name]
    apart = ["--"] if script == "frontier.py" and more else []
    return [sys.executable, str(HERE / script), *flags, *apart, *more]


def work(gpu: str, waiting: queue.SimpleQueue, folder: Path, end: float, more: list[str]) -> None:
    """Run rows on a GPU until none waits or the time is over."""
    threads = max(1, (os.cpu_count() or 1) // 4)  # more of them wait for each other where cores are shared
    own = {"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_CACHE_DIR": str(folder / f"compiled{gpu}")}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    while time.monotonic() < end:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            return
        with (folder / f"{name}.jsonl").open("w") as lines, (folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command(name, more), stdout=lines, stderr=log, env=environment)
            try:
                process.wait(max(end - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                    started.kill()
                process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    own, more = parser.parse_known_args(argv)
    own.folder.mkdir(parents=True, exist_ok=True)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in own.rows:
        waiting.put(name)
    end = time.monotonic() + 60 * own.minutes
    arguments = (waiting, own.folder.resolve(), end, more)
    workers = [threading.Thread(target=work, args=(gpu, *arguments)) for gpu in _gpus()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    empty = []
    for name in own.rows:
        path = own.folder / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        print(text, end="")
        if not text:
            empty.append(name)
    if empty:
        print(f"without a line (see the .log files): {', '.join(empty)}", file=sys.stderr)
    return 1 if empty else 0


def _gpus() -> list[str]:
    """Those that may be used, as CUDA_VISIBLE_DEVICES names them; one worker without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")
    import torch

    return [str(number) for number in range(max(1, torch.cuda.device_count()))]


if __name__ == "__main__":
    raise SystemExit(main())
