"""Adaptive norms in float32.

Every attention and feed-forward reads `rms(x) * (1 + scale) + shift`, where scale and shift are a row of the block's
table plus a row made from the noise level. The sum, the norm and the affine are float32 whatever the model's dtype;
only the result is rounded. A plain expression would keep two float32 copies of x for the backward pass, so outside of
`torch.compile` (which recomputes cheap arithmetic by itself) an autograd function keeps x alone.

B batch, T tokens, K distinct noise levels of a sample (1 or T, or what `index` points into), W channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 4  # noise levels that are chosen from one by one


class Modulation(NamedTuple):
    """Rows that modulate a stream: a learned table and what the noise level adds to it."""

    table: Tensor  # (rows, W)
    levels: Tensor  # (B, K, rows, W)
    index: Tensor | None = None  # (B, T): which of the K levels a token has; None when K is 1 or T

    def row(self, row: int) -> Tensor:
        """Row `row` in float32, (B, 1 or T, W)."""
        index = self.index
        if index is not None and torch.compiler.is_compiling():
            # A view for each row: what is made of one tensor at several places of a part, the compiler keeps.
            index = index.expand(self.table.shape[0], -1, -1)[row]
        return _row(self.table[row], self.levels[:, :, row], index)

    def needs_gradient(self) -> bool:
        return self.table.requires_grad or self.levels.requires_grad


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the channels, in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype)


def norm_modulate(x: Tensor, modulation: Modulation, scale_row: int, shift_row: int, eps: float) -> Tensor:
    """rms(x) * (1 + scale) + shift in float32, rounded to the dtype of x once. x is (B, T, W)."""
    if torch.compiler.is_compiling() or modulation.needs_gradient():
        scale, shift = modulation.row(scale_row), modulation.row(shift_row)
        return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)
    table, levels, index = modulation
    return _NormModulate.apply(
        x, table[scale_row], levels[:, :, scale_row], table[shift_row], levels[:, :, shift_row], index, eps
    )


def modulate(x: Tensor, modulation: Modulation, scale_row: int, shift_row: int) -> Tensor:
    """x * (1 + scale) + shift in float32, rounded to the dtype of x once."""
    return torch.addcmul(modulation.row(shift_row), x.float(), 1 + modulation.row(scale_row)).to(x.dtype)


def gate(residual: Tensor, update: Tensor, modulation: Modulation, row: int) -> Tensor:
    """residual + update * gate, in the dtype of the residual."""
    return torch.addcmul(residual, update.to(residual.dtype), modulation.row(row).to(residual.dtype))


def _row(table: Tensor, levels: Tensor, index: Tensor | None) -> Tensor:
    row = table.float() + levels.float()  # (B, K, W)
    if index is None:
        return row
    return spread(row, index)


def spread(levels: Tensor, index: Tensor) -> Tensor:
    """Values (B, K, ...) of noise levels and each token's level (B, T) -> (B, T, ...), or (B, 1, ...) for K of 1.

    A choice among few is arithmetic that a compiler makes again in the backward pass. What it looks up it keeps: a row
    for each token, 6.8 GiB of a full-size step.
    """
    if levels.shape[1] > _FEW:
        return levels[torch.arange(levels.shape[0], device=levels.device)[:, None], index]
    of_token = index.reshape(*index.shape, *(1 for _ in levels.shape[2:]))
    chosen = levels[:, :1]
    for level in range(1, levels.shape[1]):
        chosen = torch.where(of_token == level, levels[:, level : level + 1], chosen)
    return chosen


class _NormModulate(torch.autograd.Function):
    """`norm_modulate` for modulation rows without gradient; keeps x and views of the rows."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        scale_table: Tensor,
        scale_levels: Tensor,
        shift_table: Tensor,
        shift_levels: Tensor,
        index: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale_table, scale_levels, index)
        ctx.eps = eps
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
        scale = _row(scale_table, scale_levels, index).add_(1)
        return normed.mul_(scale).add_(_row(shift_table, shift_levels, index)).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale_table, scale_levels, index = ctx.saved_tensors
        x32 = x.float()
        inverse = (x32.square().mean(dim=-1, keepdim=True) + ctx.eps).rsqrt()  # (B, T, 1)
        normed = x32 * inverse
        grad_normed = _row(scale_table, scale_levels, index).add_(1) * grad
        overlap = (grad_normed * normed).mean(dim=-1, keepdim=True)
        grad_x = grad_normed.sub_(normed.mul_(overlap)).mul_(inverse).to(x.dtype)
        return grad_x, None, None, None, None, None, None
