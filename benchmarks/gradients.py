"""How far the gradients of the fast pass are from those of the plain one, at full width.

The plain pass is eager, with every layer by itself. One JSON line: the cosine of all adapters' gradients as one
vector, the worst cosine of a matrix, and the ratio of the norms. `--against` names the precision of the plain pass;
left out, it is that of the fast one. All other options are those of benchmarks/train_step.py.

python benchmarks/gradients.py --layers 2
python benchmarks/gradients.py --layers 2 --precision fp8_compute --against bf16
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import Tensor

from benchmarks import train_step
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece

PASSES = 5  # the fast pass is recorded in the third one and replayed from then on


def gradients(args: argparse.Namespace, passes: int) -> tuple[dict[str, Tensor], bool]:
    """Those of the last of some passes on the same inputs, on the host; whether that one was replayed."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    step = train_step.Step(args, device)
    for _ in range(passes):
        step.network.zero_grad(set_to_none=True)
        step.loss().backward()
    found = {name: parameter.grad.double().cpu() for name, parameter in step.network.named_parameters()}
    recorded = bool(step.graphs and step.graphs.recordings)
    del step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found, recorded


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--against", choices=tuple(train_step.PRECISIONS))
    own, rest = parser.parse_known_args(argv)
    args = train_step.parse_arguments(rest)
    keep_memory_in_one_piece()  # as the trainer does
    against = own.against or args.precision
    plain, _ = gradients(train_step.parse_arguments([*rest, "--precision", against, "--no-compile", "--no-joint"]), 1)
    fast, recorded = gradients(args, PASSES)
    pairs = [(fast[name].flatten(), plain[name].flatten()) for name in plain]
    cosines = [torch.nn.functional.cosine_similarity(*pair, dim=0).item() for pair in pairs]
    first, second = (torch.cat(side) for side in zip(*pairs))
    line = {
        "precision": args.precision,
        "against": against,
        "recompute": args.recompute,
        "blocks_to_swap": args.blocks_to_swap,
        "layers": args.layers,
        "recorded": recorded,
        "cosine": round(torch.nn.functional.cosine_similarity(first, second, dim=0).item(), 6),
        "worst_cosine": round(min(cosines), 6),
        "norm_ratio": round((first.norm() / second.norm()).item(), 5),
        "gpu": train_step.gpu_name(torch.device(args.device)),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
