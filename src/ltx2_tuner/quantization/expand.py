"""Products with stored weights as operators that a compiler cannot look into.

Traced openly, forward and backward expand the same weight, and the compiler would rather keep the dense matrix of every
layer from one to the other than expand it twice: that is the memory quantisation is there to save.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.quantization import fp8, nf4
from ltx2_tuner.quantization.operators import operator

NF4 = "nf4"
FP8 = {str(dtype): dtype for dtype in fp8.FP8_DTYPES}


def expand(codes: Tensor, scale: Tensor | None, column_scale: Tensor | None, stored: str, dtype: torch.dtype) -> Tensor:
    """The dense matrix (out, in) of uint8 codes.

    Args:
        codes: (out, in) bytes of fp8 numbers, or (out, in / 2) pairs of nf4 codes.
        scale: as `fp8.dequantise` and `nf4.dequantise` take it.
        column_scale: (in,) divides the matrix where given.
        stored: "nf4" or the name of an fp8 dtype.
    """
    wide = dtype if column_scale is None else torch.float32
    if stored == NF4:
        dense = nf4.dequantise(codes, scale, wide)
    else:
        dense = fp8.dequantise(codes.view(FP8[stored]), scale, wide)
    return dense if column_scale is None else (dense / column_scale).to(dtype)


def _stored_linear(
    x: Tensor, codes: Tensor, scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, stored: str
) -> Tensor:
    """x (..., in) -> (..., out) with the weight that `codes` stand for."""
    return F.linear(x, expand(codes, scale, column_scale, stored, x.dtype), bias)


def _fake(x, codes, scale, column_scale, bias, stored):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _setup(ctx, inputs, output):
    _, codes, scale, column_scale, _, ctx.stored = inputs
    ctx.save_for_backward(codes, scale, column_scale)


def _backward(ctx, gradient):
    return stored_linear_input_gradient(gradient, *ctx.saved_tensors, ctx.stored), None, None, None, None, None


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
