"""Rotary position embedding over continuous coordinates.

Each position axis is scaled to [-1, 1] by its limit and multiplied by a ladder of frequencies; the angles of all axes
share the width of the queries. Angles reach 15708 rad, where a float32 step is 1e-3: the order of operations is part
of the result and must stay. B batch, T tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """Cosines and sines, each (B, T, H, D/2) for "split" or (B, T, H, D) for "interleaved"."""

    cos: Tensor
    sin: Tensor


def frequency_ladder(
    width: int,
    axes: int,
    theta: float = 10000.0,
    *,
    double_precision: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """theta^(j/(n-1)) * pi/2 for j = 0..n-1 with n = width // (2 * axes), float32."""
    count = width // (2 * axes)
    dtype = torch.float64 if double_precision else torch.float32
    exponents = torch.linspace(0, 1, count, dtype=dtype, device=device)
    return (theta**exponents * (math.pi / 2)).float()


def rope_table(
    positions: Tensor,
    width: int,
    heads: int,
    limits: Sequence[float],
    *,
    theta: float = 10000.0,
    double_precision: bool = True,
    rope_type: str = "split",
    dtype: torch.dtype = torch.float32,
) -> RopeTable:
    """Tables for tokens at `positions`.

    Args:
        positions: (B, axes, T, 2) start and end, or (B, axes, T) points.
        width: channels of the queries, all heads together.
        limits: the coordinate of each axis that maps to 1.
        dtype: of the tables; the angles are float32 in any case.
    """
    points = positions.float()
    if points.ndim == 4:
        points = (points[..., 0] + points[..., 1]) / 2  # (B, axes, T)
    axes = points.shape[1]
    ladder = frequency_ladder(width, axes, theta, double_precision=double_precision, device=points.device)
    scaled = torch.stack([2 * (points[:, axis] / limits[axis]) - 1 for axis in range(axes)], dim=-1)  # (B, T, axes)
    angles = (scaled.unsqueeze(-2) * ladder.unsqueeze(-1)).flatten(-2)  # (B, T, n*axes), frequency-major
    padding = width // 2 - angles.shape[-1]
    # Angle 0 in front: channels that no axis claims are left as they are.
    angles = torch.nn.functional.pad(angles, (padding, 0))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if rope_type == "interleaved":
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    return RopeTable(cos.unflatten(-1, (heads, -1)), sin.unflatten(-1, (heads, -1)))


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate x (B, T, H, D) by a table whose batch may be 1."""
    cos, sin = table
    if cos.shape[-1] == x.shape[-1]:  # interleaved: neighbours (2i, 2i+1) turn together
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * cos + turned * sin
    first, second = x.chunk(2, dim=-1)  # split: the halves of a head turn together
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
