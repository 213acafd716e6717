"""From the command to the first optimizer step of ltx2_train_network.py, and the most host memory on the way.

python benchmarks/start_up.py --runs 2 -- --ltx2_checkpoint ltx-2.3.safetensors --dataset_config data.toml \\
    --output_dir output --fp8_base --fp8_scaled --mixed_precision bf16

The flags after -- are the trainer's. One JSON line a run; the second finds the checkpoint in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

SCRIPT = Path(__file__).resolve().parent.parent / "ltx2_train_network.py"
INTERVAL = 0.05  # seconds between looks at the process


def measure(flags: list[str]) -> dict[str, object]:
    """One run of one step."""
    command = [sys.executable, str(SCRIPT), *flags, "--max_train_steps", "1"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watch.start()
    text, first = "", None
    while piece := process.stderr.read(1):
        text += piece
        if first is None and "avr_loss" in text[-400:]:
            first = time.perf_counter() - start
    code = process.wait()
    if code:
        sys.stderr.write(text[-2000:])
    return {
        "first_step_sec": None if first is None else round(first, 2),
        "total_sec": round(time.perf_counter() - start, 2),
        "host_peak_gib": round(peak[0] / 2**30, 2),
        "status": code,
        "flags": [flag for flag in flags if flag.startswith("--")],
    }


def _watch(pid: int, peak: list[int]) -> None:
    """Keep the largest private memory of a process; pages of mapped files are not its own."""
    try:
        process = psutil.Process(pid)
        while True:
            memory = process.memory_info()
            peak[0] = max(peak[0], memory.rss - getattr(memory, "shared", 0))
            time.sleep(INTERVAL)
    except psutil.Error:
        return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("flags", nargs="+", help="flags of ltx2_train_network.py, after --")
    args = parser.parse_args(argv)
    lines = [measure(args.flags) for _ in range(args.runs)]
    for line in lines:
        print(json.dumps(line), flush=True)
    return int(any(line["status"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
