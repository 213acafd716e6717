"""Products with frozen weights as operators for compiled code, with the gradient of the input alone.

Compilers look into these. Their derivatives refer to the stored tensors themselves, never to a view of one: what a
compiled pass saves of a layer has to follow it to another place (see `FrozenLinear.rebind`). The operators know no
biases: `add_bias` comes after them, and the compiler has the next kernel add it. Where cuBLAS does, it takes kernels
that are up to a seventh slower (docs/lab-notes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.quantization import fp8
from ltx2_tuner.quantization.expand import FP8
from ltx2_tuner.quantization.operators import operator


def add_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """The product (..., out) with a layer's bias (out), if it has one."""
    return product if bias is None else product + bias.to(product.dtype)


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in), weight (out, in) in any dtype -> (..., out)."""
    return F.linear(x, weight.to(x.dtype), bias)


def dense_input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """(..., out), weight (out, in) -> (..., in)."""
    return gradient @ weight.to(gradient.dtype)


class PartlyTrainedProduct(torch.autograd.Function):
    """A dense product with a weight whose last rows are trained; in compiled code it is `partly_trained_linear`.

    x (..., in), weight (out, in), bias (out) or None, `trained` (r, in): another tensor for the weight's last r rows,
    the one that gets their gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, trained: Tensor) -> Tensor:
        _setup_partly_trained(ctx, (x, weight, trained), None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor]:
        of_x, _, of_trained = _partly_trained_backward(ctx, gradient)
        return of_x, None, None, of_trained


def fp8_product(x: Tensor, codes: Tensor, scale: Tensor, stored: str) -> Tensor:
    """x (..., in) -> (..., out) on the fp8 tensor cores.

    Args:
        codes: (out, in) bytes of fp8 numbers.
        scale: (out, 1) float32.
        stored: the name of the fp8 dtype.
    """
    rows, row_scale = fp8.quantise_rows(x.reshape(-1, x.shape[-1]))
    y = fp8.product(rows, row_scale, codes.view(FP8[stored]), scale, x.dtype)
    return y.view(*x.shape[:-1], codes.shape[0])


def fp8_input_gradient(
    gradient: Tensor, codes: Tensor, scale: Tensor, transposed: Tensor | None, stored: str
) -> Tensor:
    """(..., out) -> (..., in) on the fp8 tensor cores; `transposed` (in, out) holds the codes, too, where given."""
    # The sum runs over the outputs here, so their scales go into the gradient before it is quantised.
    weighted = gradient.reshape(-1, gradient.shape[-1]).float() * scale.t()
    rows, row_scale = fp8.quantise_rows(weighted)
    x = fp8_product_of_outputs(rows, row_scale, codes, transposed, stored, gradient.dtype)
    return x.view(*gradient.shape[:-1], codes.shape[1])


def fp8_product_of_outputs(
    rows: Tensor, row_scale: Tensor, codes: Tensor, transposed: Tensor | None, stored: str, dtype: torch.dtype
) -> Tensor:
    """fp8 rows (T, out) with scales (T, 1), times a weight's codes (out, in) without its scales -> (T, in)."""
    transposed = codes.t().contiguous() if transposed is None else transposed
    ones = torch.ones(transposed.shape[0], 1, device=rows.device)
    return fp8.product(rows, row_scale, transposed.view(FP8[stored]), ones, dtype)


def _dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    return dense_product(x, weight, None)


def _setup_dense(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _dense_backward(ctx, gradient):
    return dense_input_gradient(gradient, *ctx.saved_tensors), None


dense_linear = operator(_dense_linear, setup=_setup_dense, backward=_dense_backward)


def _partly_trained_product(x: Tensor, weight: Tensor, trained: Tensor) -> Tensor:
    return F.linear(x, weight)


def _setup_partly_trained(ctx, inputs, output):
    x, weight, trained = inputs
    ctx.rows = trained.shape[0]
    ctx.save_for_backward(x, weight)


def _partly_trained_backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    rows = gradient[..., -ctx.rows :].reshape(-1, ctx.rows)
    of_x = gradient @ weight if ctx.needs_input_grad[0] else None
    return of_x, None, rows.t() @ x.reshape(-1, x.shape[-1])


partly_trained_linear = operator(
    _partly_trained_product, setup=_setup_partly_trained, backward=_partly_trained_backward
)


def _fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, transposed: Tensor | None, stored: str) -> Tensor:
    return fp8_product(x, codes, scale, stored)


def _setup_fp8(ctx, inputs, output):
    _, codes, scale, transposed, ctx.stored = inputs
    ctx.save_for_backward(codes, scale, transposed)


def _fp8_backward(ctx, gradient):
    return fp8_input_gradient(gradient, *ctx.saved_tensors, ctx.stored), None, None, None, None


fp8_linear = operator(_fp8_linear, setup=_setup_fp8, backward=_fp8_backward)
