"""A low-rank adapter and the module that puts it beside a frozen linear layer.

    y = base(x) + multiplier · (alpha / r) · up(down(x))

The base may be any linear layer (bf16, fp8, nf4, another LoRALinear): the adapter adds to its output. The adapter keeps
its matrices in float32 and multiplies in the compute dtype: the one set with `compute_dtype`, else that of autocast,
else that of its parameters. On a frozen layer of `quantization` both halves are one node of the graph, which keeps x
itself for backward and adds the adapter's part of the input gradient into the base's; compiled code gets plain
operations instead, which the compiler fuses as it sees fit.

Legend: B batch, T tokens, r rank.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2_tuner.quantization.frozen import FrozenLinear


class _AdaptedProduct(torch.autograd.Function):
    """base(x) + scale · ((x downᵀ) · mask) upᵀ as one node.

    Kept for backward: x itself, the r columns of the hidden product and the two matrices in x's dtype; no float32
    copies and no base output. The base's product and input gradient come from the layer, which also has its tensors
    in place again at the time of backward (block streaming).
    """

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, layer: FrozenLinear, scale: float, mask: Tensor | None):
        ctx.dtypes = down.dtype, up.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        hidden = _hidden(x, down, scale, mask)
        out = layer.product(x)
        rows = out.view(-1, out.shape[-1])
        rows.addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t())
        ctx.save_for_backward(x, hidden, down, up, mask)
        ctx.layer, ctx.scale = layer, scale
        return torch.ops.aten._unsafe_view(out, out.shape)  # no view, so that whoever comes next may write into it

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, down, up, mask = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, out)
        hidden_rows = hidden.reshape(-1, hidden.shape[-1])  # (N, r)
        grad_hidden = rows @ up
        if ctx.scale != 1.0:
            grad_hidden.mul_(ctx.scale)
        if mask is not None:
            grad_hidden = (grad_hidden.view(hidden.shape) * mask).view(hidden_rows.shape)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[2]:
            grad_up = (rows.t() @ hidden_rows).to(ctx.dtypes[1])
        if ctx.needs_input_grad[1]:
            grad_down = (grad_hidden.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
        if ctx.needs_input_grad[0]:
            grad_x = ctx.layer.input_gradient(grad)
            grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_hidden, down)
        return grad_x, grad_down, grad_up, None, None, None


def _hidden(x: Tensor, down: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """scale · (x downᵀ) · mask, (..., r); a scale of 1, which alpha = rank gives, costs nothing."""
    hidden = F.linear(x, down)
    if mask is not None:
        hidden = hidden * mask
    return hidden if scale == 1.0 else hidden * scale


def multiplying_in(dtype: torch.dtype, device_type: str) -> AbstractContextManager:
    """Products of factors in `dtype` stay in it. Nothing without need: torch keeps no compilation of a switch."""
    kept = not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) == dtype
    return nullcontext() if kept else torch.autocast(device_type, enabled=False)


class _Matrix(nn.Module):
    """One float32 matrix under the name `weight`, so that state dicts read `lora_down.weight`."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


class LoRAAdapter(nn.Module):
    """The trainable half of a LoRALinear; its state dict is the kohya form (lora_down, lora_up, alpha).

    Args:
        rank: r, at least 1.
        alpha: None or 0 means r, so that the scale alpha/r is 1.
        dropout: share of the elements of down(x) set to zero while training.
        rank_dropout: share of the ranks switched off per sample while training.
        module_dropout: probability that the whole adapter adds nothing in a forward pass while training.

    The masks come from torch's default generator of x's device; recomputation sees the same ones when it restores
    the generator (torch's checkpointing does unless told otherwise).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} is below 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.lora_down = _Matrix(rank, in_features)
        self.lora_up = _Matrix(out_features, rank)
        self.alpha_value = float(alpha or rank)
        self.register_buffer("alpha", torch.tensor(self.alpha_value))
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.multiplier = 1.0
        self.enabled = True
        self.compute_dtype: torch.dtype | None = None
        # What stands for both matrices in passes with gradients, and without (see `working_copies`).
        self.copies: tuple[Tensor, Tensor] | None = None
        self.copies_without_gradients: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha_value / self.rank

    def initialise(self, generator: torch.Generator) -> None:
        """down uniform in ±1/√in (Kaiming with a = √5), up zeros: the adapter starts as nothing."""
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.lora_down.weight.uniform_(-bound, bound, generator=generator)
            self.lora_up.weight.zero_()

    @torch.no_grad()
    def assign(self, down: Tensor, up: Tensor, alpha: float) -> None:
        """Take trained matrices; a differing alpha is folded into `up`, so that the strength stays what it was."""
        self.lora_down.weight.copy_(down)
        factor = alpha / self.alpha_value
        self.lora_up.weight.copy_(up if factor == 1.0 else up.float() * factor)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(alpha / r) · up · down in float32, (out, in)."""
        return self.scale * (self.lora_up.weight.float() @ self.lora_down.weight.float())

    @property
    def is_active(self) -> bool:
        """False while switched off or of strength 0."""
        return self.enabled and self.multiplier != 0.0

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """base(x) plus the adapter of x: (..., in) -> (..., out)."""
        if not self.is_active:
            return base(x)
        scale = self.multiplier * self.scale
        copies = self.copies if torch.is_grad_enabled() else self.copies_without_gradients
        down, up = copies or (self.lora_down.weight, self.lora_up.weight)
        autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        dtype = self.compute_dtype or autocast or down.dtype
        fused = isinstance(base, FrozenLinear) and dtype == (autocast or x.dtype)
        if fused and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x = x.to(dtype)
            return _AdaptedProduct.apply(x, down, up, base, scale, self._mask(x))
        out = base(x)
        with multiplying_in(dtype, x.device.type):
            x = x.to(dtype)
            hidden, mask = F.linear(x, down.to(dtype)), self._mask(x)
            if mask is not None:
                hidden = hidden * mask
            hidden = hidden if scale == 1.0 else hidden * scale
            return (out + F.linear(hidden, up.to(dtype))).to(out.dtype)

    def _mask(self, x: Tensor) -> Tensor | None:
        """The product of the three dropouts' masks, broadcastable to down(x), or None when none is drawn."""
        if not self.training:
            return None
        mask = None
        shape = (*x.shape[:-1], self.rank)
        per_sample = (shape[0], *(1 for _ in shape[1:-1]), self.rank) if len(shape) > 1 else shape
        for probability, size in ((self.dropout, shape), (self.rank_dropout, per_sample), (self.module_dropout, ())):
            if probability:
                kept = (torch.rand(size, device=x.device) >= probability).to(x.dtype)
                if size != ():  # a dropped module is not made up for by the others (06 section 6.3)
                    kept = kept / (1.0 - probability)
                mask = kept if mask is None else mask * kept
        return mask


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it; stands where the linear stood in its parent."""

    def __init__(self, base: nn.Module, adapter: LoRAAdapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight of the innermost base."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.adapter(x, self.base)
