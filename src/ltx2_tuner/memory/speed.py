"""How fast a device multiplies and how fast weights reach it: two short measurements for predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SIDE = 4096  # of the matrices
_BYTES = 64 << 20  # of the copy
# Shares of these rates that a training step reaches. Copies wait for memory that kernels use meanwhile.
_USED, _USED_OF_COPIES = 0.65, 0.9


@dataclass(frozen=True)
class Speed:
    """Of a training step. operations: floating point operations a second; copies: bytes a second, host to device."""

    operations: float
    copies: float


def measure_speed(device: torch.device) -> Speed | None:
    """Takes some milliseconds; None where the device is no GPU or has no memory left for it."""
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            matrix = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
            host = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
            target = torch.empty_like(host, device=device)
            product = _seconds(lambda: matrix @ matrix)
            copy = _seconds(lambda: target.copy_(host, non_blocking=True))
    except RuntimeError:  # out of memory, or host memory that cannot be page-locked
        return None
    return Speed(2 * _SIDE**3 / product * _USED, _BYTES / copy * _USED_OF_COPIES)


def _seconds(work) -> float:
    """Of one run among several, after one that warms up."""
    work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(5):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 5e3
