"""Masks as additive biases for attention scores."""

from __future__ import annotations

import torch
from torch import Tensor


def context_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Text mask -> (B, 1, rows, S) bias, or None for no mask.

    Integers and booleans are 1/0 (B, S) or (B, rows, S): 0 becomes a large negative number, finite so that a row of
    zeros degrades to a uniform average and not to NaN. A floating mask is taken as the bias itself.
    """
    if mask is None:
        return None
    if mask.is_floating_point():
        bias = mask.to(dtype)
    else:
        bias = (mask.to(torch.int64) - 1).to(dtype) * torch.finfo(dtype).max
    if bias.ndim == 2:
        bias = bias[:, None]
    return bias[:, None] if bias.ndim == 3 else bias


def strength_bias(strength: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Self-attention strengths in [0, 1], (B, T, T) or (B, 1, T) -> (B, 1, T or 1, T) bias, or None.

    1 leaves a pair alone, 0.5 halves its odds, 0 excludes it.
    """
    if strength is None:
        return None
    limits = torch.finfo(dtype)
    strength = strength.to(dtype)
    bias = torch.where(strength > 0, strength.clamp(min=limits.tiny).log(), limits.min)
    return bias.unsqueeze(1)


def key_bias(valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Which tokens may be attended to, (B, T) -> bias (B, 1, 1, T) and keep (B, 1, 1), or None for all.

    `keep` is 0 for a sample without any valid token: what attends to it must get nothing at all.
    """
    if valid is None:
        return None
    valid = valid.bool()
    bias = torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, torch.finfo(dtype).min)
    return bias[:, None, None], valid.any(dim=1).to(dtype)[:, None, None]
