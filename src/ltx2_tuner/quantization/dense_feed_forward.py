"""Two dense layers with GELU between them as one operator for compiled code; GELU is part of the products.

The hidden rows are by far the widest of a block. What GELU is applied to is kept for the backward pass, written by the
same kernel that makes the hidden rows; the derivative is applied by the one that makes their gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx2_tuner.quantization import cublaslt
from ltx2_tuner.quantization.frozen import DenseLinear, product_dtype
from ltx2_tuner.quantization.operators import operator
from ltx2_tuner.quantization.products import add_bias, dense_input_gradient, dense_product


def suits(first: nn.Module, second: nn.Module) -> bool:
    """Whether these are frozen dense layers without adapters."""
    return type(first) is DenseLinear and type(second) is DenseLinear and first.weight.dtype == second.weight.dtype


def multiply(feed_forward: nn.Module, x: Tensor) -> Tensor:
    """x (..., in) through both layers -> (..., out)."""
    first, second = feed_forward.net[0].proj, feed_forward.net[2]
    dtype = product_dtype(x)
    large = suits(first, second) and first.weight.dtype == dtype and cublaslt.suits(x.to(dtype), first.weight)
    if not (torch.compiler.is_compiling() and large):
        return second(feed_forward.net[0](x))
    y, _ = dense_feed_forward(x.to(dtype), first.weight, first.bias, second.weight)
    return add_bias(y, second.bias)


@torch.library.custom_op("ltx2_tuner::gelu_product", mutates_args=())
def gelu_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `cublaslt.gelu_product`."""
    return cublaslt.gelu_product(x, weight, None if bias is None else bias.to(x.dtype))


@gelu_product.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("ltx2_tuner::gelu_input_gradient", mutates_args=())
def gelu_input_gradient(gradient: Tensor, weight: Tensor, pre: Tensor) -> Tensor:
    """See `cublaslt.gelu_input_gradient`."""
    return cublaslt.gelu_input_gradient(gradient, weight, pre)


@gelu_input_gradient.register_fake
def _(gradient, weight, pre):
    return pre.new_empty(pre.shape)


def _dense_feed_forward(x: Tensor, weight: Tensor, bias: Tensor | None, second: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., in), both weights -> (..., out) without the second layer's bias, and what GELU is applied to (T, hidden).

    The latter is for the backward pass and has no gradient.
    """
    hidden, pre = gelu_product(x.reshape(-1, x.shape[-1]), weight, bias)
    return dense_product(hidden, second, None).view(*x.shape[:-1], second.shape[0]), pre


def _setup(ctx, inputs, output):
    _, weight, _, second = inputs
    ctx.save_for_backward(output[1], weight, second)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, _):
    pre, weight, second = ctx.saved_tensors
    of_pre = gelu_input_gradient(gradient.reshape(-1, gradient.shape[-1]), second, pre)
    return dense_input_gradient(of_pre, weight).view(*gradient.shape[:-1], weight.shape[1]), None, None, None


dense_feed_forward = operator(_dense_feed_forward, setup=_setup, backward=_backward)
