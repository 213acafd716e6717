"""Seconds a step and peak memory of ltx2_train_network.py itself, with CREPA and DOP together and without either.

python benchmarks/full_size.py /tmp/full
python benchmarks/combined.py /tmp/full                                 # fp8, 40 blocks streamed, recomputation
python benchmarks/combined.py /tmp/full --runs regularized -- --blocks_to_swap 47    # flags of the trainer win

Reads the folder that full_size.py wrote, runs the script for a few steps and takes the figures from the run's own
`<output_name>.log.csv`. One JSON line a run; the last output of a run that fails goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.full_size import CHECKPOINT, CLASS_PROMPT, DATASET
from benchmarks.processes import run_watched
from ltx2_tuner.training.run_log import read_log

SCRIPT = Path(__file__).resolve().parent.parent / "ltx2_train_network.py"
WARM_UP = 3  # steps
SETTING = (
    "--ltx2_mode av --network_module networks.lora_ltx2 --network_dim 32 --network_alpha 32 --optimizer_type AdamW "
    "--learning_rate 1e-4 --seed 7 --mixed_precision bf16 --fp8_base --fp8_scaled --blocks_to_swap 40 "
    "--gradient_checkpointing"
)
RUNS = {
    "plain": "",
    "regularized": f"--crepa --dop --dop_args class={CLASS_PROMPT} --use_precached_preservation",
}


def measure(name: str, folder: Path, steps: int, more: list[str]) -> dict[str, object]:
    """One run of the script."""
    setting = [*SETTING.split(), *RUNS[name].split(), *more]
    with tempfile.TemporaryDirectory() as output:
        flags = ["--ltx2_checkpoint", str(folder / CHECKPOINT), "--dataset_config", str(folder / DATASET)]
        flags += ["--output_dir", output, "--output_name", name, "--max_train_steps", str(steps)]
        flags += setting
        outcome = run_watched([sys.executable, str(SCRIPT), *flags])
        rows = read_log(Path(output) / f"{name}.log.csv")
    if outcome.status:
        sys.stderr.write(outcome.error_text[-4000:])
    seconds = [row["perf/step_seconds"] for row in rows if row["step"] > WARM_UP]
    peaks = [row["perf/peak_memory_gib"] for row in rows if "perf/peak_memory_gib" in row]
    last = rows[-1] if rows else {}
    return {
        "run": name,
        "steps": len(rows),
        "sec": round(statistics.median(seconds), 4) if seconds else None,
        "peak_gib": round(max(peaks), 2) if peaks else None,
        **outcome.memory(),
        "total_sec": round(outcome.seconds, 1),
        "losses": {key: value for key, value in last.items() if key.startswith("loss/")},
        "flags": setting,
        "status": outcome.status,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by full_size.py")
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    parser.add_argument("--steps", type=int, default=8, help=f"of each run; the first {WARM_UP} do not count")
    words, more = list(sys.argv[1:] if argv is None else argv), []
    if "--" in words:
        words, more = words[: words.index("--")], words[words.index("--") + 1 :]
    args = parser.parse_args(words)
    status = 0
    for name in args.runs:
        line = measure(name, args.folder, args.steps, more)
        print(json.dumps(line), flush=True)
        status |= bool(line["status"])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
