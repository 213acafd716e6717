"""Products with stored weights as operators that a compiler cannot look into.

Traced openly, forward and backward expand the same weight, and the compiler would rather keep the dense matrix of every
layer from one to the other than expand it twice: that is the memory quantisation is there to save. Blocks that
recompute everything keep nothing from their forward pass; there compiled code sees the matrix (`expanded`), which then
lives from the second forward run to the input's gradient and is made once for both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.quantization import fp8, nf4
from ltx2_tuner.quantization.operators import operator

NF4 = "nf4"
FP8 = {str(dtype): dtype for dtype in fp8.FP8_DTYPES}


def expand(
    codes: Tensor,
    scale: Tensor | None,
    column_scale: Tensor | None,
    stored: str,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The dense matrix (out, in) of uint8 codes.

    Args:
        codes: (out, in) bytes of fp8 numbers, or (out, in / 2) pairs of nf4 codes.
        scale: as `fp8.dequantise` and `nf4.dequantise` take it.
        column_scale: (in,) divides the matrix where given.
        stored: "nf4" or the name of an fp8 dtype.
        out: contiguous, where the matrix is to be (not with a column_scale).
    """
    wide = dtype if column_scale is None else torch.float32
    if stored == NF4:
        dense = nf4.dequantise(codes, scale, wide, out)
    else:
        dense = fp8.dequantise(codes.view(FP8[stored]), scale, wide, out)
    return dense if column_scale is None else (dense / column_scale).to(dtype)


def _stored_linear(x: Tensor, codes: Tensor, scale: Tensor | None, column_scale: Tensor | None, stored: str) -> Tensor:
    """x (..., in) -> (..., out) with the weight that `codes` stand for."""
    return F.linear(x, expand(codes, scale, column_scale, stored, x.dtype))


def _fake(x, codes, scale, column_scale, stored):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _setup(ctx, inputs, output):
    _, codes, scale, column_scale, ctx.stored = inputs
    ctx.save_for_backward(codes, scale, column_scale)


def _backward(ctx, gradient):
    return stored_linear_input_gradient(gradient, *ctx.saved_tensors, ctx.stored), None, None, None, None


stored_linear = operator(_stored_linear, fake=_fake, setup=_setup, backward=_backward)


@torch.library.custom_op("ltx2_tuner::stored_linear_input_gradient", mutates_args=())
def stored_linear_input_gradient(
    gradient: Tensor, codes: Tensor, scale: Tensor | None, column_scale: Tensor | None, stored: str
) -> Tensor:
    """Gradient of the output (..., out) -> gradient of the input (..., in)."""
    return gradient @ expand(codes, scale, column_scale, stored, gradient.dtype)


@stored_linear_input_gradient.register_fake
def _(gradient, codes, scale, column_scale, stored):
    width = codes.shape[1] * (2 if stored == NF4 else 1)
    return gradient.new_empty(*gradient.shape[:-1], width)


@torch.library.custom_op("ltx2_tuner::expanded", mutates_args=())
def expanded(
    codes: Tensor, scale: Tensor | None, column_scale: Tensor | None, stored: str, dtype: torch.dtype
) -> Tensor:
    """`expand` as an operator: for compiled code that shall see the dense matrix."""
    return expand(codes, scale, column_scale, stored, dtype)


@expanded.register_fake
def _(codes, scale, column_scale, stored, dtype):
    width = codes.shape[1] * (2 if stored == NF4 else 1)
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@torch.library.custom_op("ltx2_tuner::expanded_stack", mutates_args=())
def expanded_stack(codes: list[Tensor], scales: list[Tensor], rows: Tensor, stored: str) -> Tensor:
    """The matrices of several layers and more dense `rows`, one below the other."""
    return _expand_stack(codes, scales, rows, stored)


@expanded_stack.register_fake
def _(codes, scales, rows, stored):
    return rows.new_empty(sum(layer.shape[0] for layer in codes) + rows.shape[0], rows.shape[1])


def _expand_stack(codes: list[Tensor], scales: list[Tensor], rows: Tensor, stored: str) -> Tensor:
    """As an operator it is `expanded_stack`."""
    counts = [layer.shape[0] for layer in codes]
    weight = rows.new_empty(sum(counts) + rows.shape[0], rows.shape[1])
    *places, last = weight.split([*counts, rows.shape[0]])
    for place, layer, scale in zip(places, codes, scales):
        expand(layer, scale, None, stored, rows.dtype, place)
    last.copy_(rows)
    return weight


def _stacked_linear(
    x: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    rows: Tensor,
    trained: Tensor,
    bias: Tensor | None,
    stored: str,
) -> Tensor:
    """Layers of one input x (..., in) and dense `rows` of the same width, as one product -> (..., all outputs).

    `trained` is another tensor for the last of these rows: the one that gets their gradient. `bias` (all outputs).
    """
    return F.linear(x, _expand_stack(codes, scales, rows, stored), bias)


def _fake_stacked(x, codes, scales, rows, trained, bias, stored):
    return x.new_empty(*x.shape[:-1], sum(layer.shape[0] for layer in codes) + rows.shape[0])


def _setup_stacked(ctx, inputs, output):
    x, codes, scales, rows, trained, _, ctx.stored = inputs
    ctx.counts = len(codes), trained.shape[0]
    ctx.save_for_backward(x, rows, *codes, *scales)


def _backward_stacked(ctx, gradient):
    x, rows, *layers = ctx.saved_tensors
    count, trained = ctx.counts
    of_x = None
    if ctx.needs_input_grad[0]:
        of_x = stacked_linear_input_gradient(gradient, layers[:count], layers[count:], rows, ctx.stored)
    of_trained = gradient[..., -trained:].reshape(-1, trained).t() @ x.reshape(-1, x.shape[-1])
    return of_x, [None] * count, [None] * count, None, of_trained, None, None


stacked_linear = operator(_stacked_linear, fake=_fake_stacked, setup=_setup_stacked, backward=_backward_stacked)


@torch.library.custom_op("ltx2_tuner::stacked_linear_input_gradient", mutates_args=())
def stacked_linear_input_gradient(
    gradient: Tensor, codes: list[Tensor], scales: list[Tensor], rows: Tensor, stored: str
) -> Tensor:
    """Gradient of all outputs (..., sum of out) -> gradient of the input (..., in)."""
    return gradient @ _expand_stack(codes, scales, rows, stored)


@stacked_linear_input_gradient.register_fake
def _(gradient, codes, scales, rows, stored):
    return gradient.new_empty(*gradient.shape[:-1], rows.shape[1])
