"""Time of one frozen linear layer, forward and input gradient, in every precision, as JSON lines (needs a GPU).

    python benchmarks/frozen_linear.py [--tokens 2688]

`expand_ms` is the time of making the dense weight alone; errors are relative to the bf16 layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from ltx2_tuner.quantization import FrozenLinear
from ltx2_tuner.quantization.formats import WeightFormat, freeze

SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (2048, 2048))
FORMATS = {
    "bf16": WeightFormat(),
    "fp8 block": WeightFormat("fp8"),
    "fp8 row": WeightFormat("fp8", fp8_scales="row"),
    "fp8 row, fp8 products": WeightFormat("fp8", fp8_scales="row", fp8_compute=True),
    "fp8 row, fp8 products, transposed kept": WeightFormat("fp8", "row", True, True),
    "nf4": WeightFormat("nf4"),
}


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Mean time of `work` on the GPU after three rounds of warm-up."""
    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def measure(
    layer: FrozenLinear, x: Tensor, direction: Tensor, compiled: bool
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Times, the output and the input gradient of a layer."""
    run = torch.compile(layer, dynamic=False) if compiled else layer
    y = run(x)
    (gradient,) = torch.autograd.grad(y, x, direction)

    def both() -> None:
        torch.autograd.grad(run(x), x, direction)

    with torch.no_grad():
        times = {"forward_ms": milliseconds(lambda: run(x)), "expand_ms": milliseconds(lambda: layer.dense(x.dtype))}
    times["forward_backward_ms"] = milliseconds(both)
    return times, y.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2688)
    tokens = parser.parse_args().tokens
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": tokens}))
    for rows, columns in SHAPES:
        generator = torch.Generator("cuda").manual_seed(0)
        options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        weight = torch.randn(rows, columns, **options) * 0.02
        x = torch.randn(1, tokens, columns, **options).requires_grad_()
        direction = torch.randn(1, tokens, rows, **options)
        exact = None
        for name, form in FORMATS.items():
            layer = freeze("layer.weight", weight, torch.zeros_like(weight[:, 0]), form, torch.bfloat16)
            for compiled in (False, True):
                torch.compiler.reset()
                times, y, gradient = measure(layer, x, direction, compiled)
                exact = exact or (y.float(), gradient.float())
                found = {"shape": [rows, columns], "member": name, "compiled": compiled} | times
                for key, value, reference in (("output_error", y, exact[0]), ("gradient_error", gradient, exact[1])):
                    found[key] = ((value.float() - reference).norm() / reference.norm()).item()
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
