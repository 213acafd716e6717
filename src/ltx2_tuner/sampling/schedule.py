"""Noise levels of a sampling run (spec of LTX-2's default scheduler: a shifted line, stretched to end at 0.1)."""

from __future__ import annotations

import math

import torch

# Fixed lists of the distilled checkpoints.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
STAGE2_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)

ANCHOR_TOKENS = (1024, 4096)


def token_shift(tokens: int, base_shift: float = 0.95, max_shift: float = 2.05) -> float:
    """The shift for a token count: linear through both anchors, extrapolated beyond them without clamping."""
    low, high = ANCHOR_TOKENS
    return base_shift + (tokens - low) * (max_shift - base_shift) / (high - low)


def ltx2_sigmas(
    steps: int,
    tokens: int = ANCHOR_TOKENS[1],
    *,
    base_shift: float = 0.95,
    max_shift: float = 2.05,
    terminal: float | None = 0.1,
) -> torch.Tensor:
    """The `steps + 1` noise levels from 1 down to 0, float32.

    Args:
        steps: number of Euler steps, at least 1.
        tokens: token count the shift follows; previews use the default whatever their size.
        terminal: last non-zero level after stretching; None leaves the line unstretched.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    if steps == 1:
        return torch.tensor([1.0, 0.0])
    # The order of these operations decides the last bit, and guidance amplifies it over the steps.
    line = torch.linspace(1.0, 0.0, steps + 1)
    factor = math.exp(token_shift(tokens, base_shift, max_shift))
    sigmas = torch.where(line > 0, factor / (factor + (1 / line - 1)), 0.0)
    if terminal is not None:
        distance = 1 - sigmas
        sigmas = torch.where(line > 0, 1 - distance / (distance[-2] / (1 - terminal)), 0.0)
    return sigmas


def stage2_sigmas(steps: int) -> torch.Tensor:
    """Levels of the second stage: the fixed list at 3 steps, else that list interpolated over its index."""
    positions = torch.linspace(0, len(STAGE2_SIGMAS) - 1, steps + 1)
    values = torch.tensor(STAGE2_SIGMAS)
    low = positions.floor().long().clamp(max=len(STAGE2_SIGMAS) - 2)
    return torch.lerp(values[low], values[low + 1], positions - low)
