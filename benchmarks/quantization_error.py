"""What quantisation costs in accuracy: MAE, SNR and cosine on N(0,1) weights of LTX-2 layer shapes, as JSON lines.

    python benchmarks/quantization_error.py [--device cuda] [--rank 32] [--scale 1] [--dtype float32]

`--scale 8` divides the shapes by 8 for a quick look. Scales are stored in the dtype of the weights, so `--dtype
bfloat16` is what a bf16 checkpoint loses. LoftQ errors are those of base + up·down (2 iterations).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from ltx2_tuner.quantization import fp8, nf4
from ltx2_tuner.quantization.loftq import LoftQ

# (out, in) of the matrices of a block: attention, both feed-forwards, the exchange between the streams.
SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (2048, 2048), (8192, 2048), (2048, 8192), (2048, 4096))


def errors(weight: Tensor, stored: Tensor) -> dict[str, float]:
    """MAE, signal-to-noise ratio in dB and cosine similarity of a matrix and what is stored of it, in float64."""
    weight, stored = weight.double(), stored.double()
    noise = weight - stored
    return {
        "mae": noise.abs().mean().item(),
        "snr_db": (10 * torch.log10(weight.square().sum() / noise.square().sum())).item(),
        "cosine": torch.nn.functional.cosine_similarity(weight.flatten(), stored.flatten(), dim=0).item(),
    }


def methods(rank: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> what a method keeps of a matrix, in float32; scales have the dtype of the matrix."""

    def scaled_fp8(mode: str) -> Callable[[Tensor], Tensor]:
        def stored(weight: Tensor) -> Tensor:
            codes, scale = fp8.quantise(weight, mode)
            return fp8.dequantise(codes, scale.to(weight.dtype), torch.float32)

        return stored

    def with_loftq(weight: Tensor) -> Tensor:
        loftq = LoftQ(rank, 2, 32)
        base = loftq("layer.weight", weight)
        down, up = loftq.factors["layer"]
        return base.dense() + (up @ down).to(weight.device)

    return {
        "bf16": lambda weight: weight.bfloat16().float(),
        "fp8_base fp8_scaled (block)": scaled_fp8("block"),
        "fp8_base fp8_scaled (row)": scaled_fp8("row"),
        "nf4_base": lambda weight: nf4.quantise(weight, 32, weight.dtype).dense(),
        f"nf4_base loftq_init (rank {rank})": with_loftq,
    }


def measure(
    shapes: tuple[tuple[int, int], ...], rank: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, object]]:
    """One record for each method: its errors averaged over the shapes. dtype: of the weights."""
    for name, stored in methods(rank).items():
        if name == "bf16" and dtype == torch.bfloat16:
            continue  # nothing is lost
        generator = torch.Generator().manual_seed(0)
        found = []
        for shape in shapes:
            weight = torch.randn(shape, generator=generator).to(device, dtype)
            found.append(errors(weight, stored(weight)))
        yield {"method": name} | {key: sum(each[key] for each in found) / len(found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--scale", type=int, default=1, help="divide the shapes by this")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    args = parser.parse_args()
    shapes = tuple((rows // args.scale, columns // args.scale) for rows, columns in SHAPES)
    print(json.dumps({"shapes": shapes, "device": args.device, "dtype": args.dtype, "torch": torch.__version__}))
    for record in measure(shapes, args.rank, args.device, getattr(torch, args.dtype)):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
