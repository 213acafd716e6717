"""From the command to the first optimizer step of ltx2_train_network.py, and the most host memory on the way.

python benchmarks/start_up.py --runs 2 -- --ltx2_checkpoint ltx-2.3.safetensors --dataset_config data.toml \\
    --output_dir output --fp8_base --fp8_scaled --mixed_precision bf16

The flags after -- are the trainer's. One JSON line a run; the second finds the checkpoint in the page cache.
`weights_gib` is the size of the transformer's weights in the precision of the run, `host_share` the peak over it. The
seconds count from the command to the beginning and the end of reading, the end of the rehearsal, the first step and the
end; `rehearsal` is what the trainer says of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.processes import run_watched
from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.cli.arguments_memory import precision_options
from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.memory.sizes import weight_sizes
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig

SIGNS = {  # what the trainer says, and the name of the second in which it says it
    "transformer:   0%": "reading_sec",
    "transformer: 100%": "read_sec",
    "rehearsed the largest batch": "rehearsed_sec",
    "avr_loss": "first_step_sec",
}
SCRIPT = Path(__file__).resolve().parent.parent / "ltx2_train_network.py"
_GIB = 2**30


def measure(flags: list[str]) -> dict[str, object]:
    """One run of one step."""
    start, recent = time.perf_counter(), ""
    seconds: dict[str, float | None] = dict.fromkeys(SIGNS.values())

    def hear(piece: str) -> None:
        nonlocal recent
        recent = (recent + piece)[-40:]
        for sign, name in SIGNS.items():
            if seconds[name] is None and recent.endswith(sign):
                seconds[name] = round(time.perf_counter() - start, 2)

    outcome = run_watched([sys.executable, str(SCRIPT), *flags, "--max_train_steps", "1"], hear)
    if outcome.status:
        sys.stderr.write(outcome.error_text[-2000:])
    weights = weight_bytes(flags)
    said = re.search("rehearsed the largest batch: (.*)", outcome.error_text)
    return {
        **seconds,
        "rehearsal": said and said[1],
        "total_sec": round(outcome.seconds, 2),
        **outcome.memory(),
        "weights_gib": round(weights / _GIB, 2),
        "host_share": round(outcome.host_peak / weights, 3),
        "status": outcome.status,
        "flags": [flag for flag in flags if flag.startswith("--")],
    }


def weight_bytes(flags: list[str]) -> int:
    """Bytes of the transformer in the precision that the flags ask for."""
    args = parse_with_config(build_parser(), flags)
    checkpoint = Checkpoint.open(args.ltx2_checkpoint)
    with torch.device("meta"):
        model = LTXTransformer(TransformerConfig.from_dict(checkpoint.config["transformer"]))
    checkpoint.close()
    sizes = weight_sizes(model, precision_options(args).weights, args.dit_dtype)
    return sizes.blocks * sizes.block + sizes.rest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("flags", nargs="+", help="flags of ltx2_train_network.py, after --")
    args = parser.parse_args(argv)
    status = 0
    for _ in range(args.runs):
        line = measure(args.flags)
        print(json.dumps(line), flush=True)
        status |= bool(line["status"])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
