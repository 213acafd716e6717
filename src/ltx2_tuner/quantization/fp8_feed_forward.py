"""Two layers with GELU between them on the fp8 tensor cores, as one operator for compiled code.

The hidden rows are by far the widest of a block, and torch's compiler reads them twice, and computes GELU twice, to
quantise them. So kernels of our own do it (`row_kernels`), which the compiler does not look into; around them it sees
the products, and what quantises the narrower rows at either end it fuses with what makes these.

For the backward pass the operator keeps the first product, before its bias, and refers to the stored tensors themselves
(see `products`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx2_tuner.quantization import fp8, row_kernels
from ltx2_tuner.quantization.expand import FP8
from ltx2_tuner.quantization.frozen import Fp8Linear, product_dtype
from ltx2_tuner.quantization.operators import operator
from ltx2_tuner.quantization.products import add_bias, fp8_input_gradient, fp8_product, fp8_product_of_outputs


def suits(first: nn.Module, second: nn.Module) -> bool:
    """Whether these are layers without adapters that multiply in fp8, of a width that the kernels take."""
    if type(first) is not Fp8Linear or type(second) is not Fp8Linear:
        return False
    cores = first.tensor_cores and second.tensor_cores
    return cores and first.stored == second.stored and first.out_features <= row_kernels.WIDEST


def multiply(feed_forward: nn.Module, x: Tensor) -> Tensor:
    """x (..., in) through both layers -> (..., out)."""
    first, second = feed_forward.net[0].proj, feed_forward.net[2]
    if not (torch.compiler.is_compiling() and suits(first, second)):
        return second(feed_forward.net[0](x))
    stored = (first.codes, first.scale, first.transposed, first.bias, second.codes, second.scale, second.transposed)
    y, _ = fp8_feed_forward(x.to(product_dtype(x)), *stored, first.stored)
    return add_bias(y, second.bias)


@torch.library.custom_op("ltx2_tuner::fp8_gelu_rows", mutates_args=())
def fp8_gelu_rows(pre: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `row_kernels.gelu_rows`."""
    return (row_kernels.gelu_rows if _has_kernels(pre) else row_kernels.plain_gelu_rows)(pre, bias)


@torch.library.custom_op("ltx2_tuner::fp8_gelu_gradient_rows", mutates_args=())
def fp8_gelu_gradient_rows(gradient: Tensor, pre: Tensor, bias: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor]:
    """See `row_kernels.gelu_gradient_rows`."""
    kernel = row_kernels.gelu_gradient_rows if _has_kernels(pre) else row_kernels.plain_gelu_gradient_rows
    return kernel(gradient, pre, bias, factor)


@fp8_gelu_rows.register_fake
@fp8_gelu_gradient_rows.register_fake
def _fake_rows(x, *_):
    return x.new_empty(x.shape, dtype=row_kernels.CODES), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and row_kernels.available()


def _fp8_feed_forward(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    transposed: Tensor | None,
    bias: Tensor | None,
    second_codes: Tensor,
    second_scale: Tensor,
    second_transposed: Tensor | None,
    stored: str,
) -> tuple[Tensor, Tensor]:
    """x (..., in) -> (..., out) without the second layer's bias, and the first layer's product (T, hidden).

    The latter is for the backward pass and has no gradient. Layers as `products.fp8_product` takes them.
    """
    pre = fp8_product(x.reshape(-1, x.shape[-1]), codes, scale, stored)
    y = fp8.product(*fp8_gelu_rows(pre, bias), second_codes.view(FP8[stored]), second_scale, x.dtype)
    return y.view(*x.shape[:-1], second_codes.shape[0]), pre


def _setup(ctx, inputs, output):
    *tensors, ctx.stored = inputs
    ctx.save_for_backward(output[1], *tensors[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, _):
    pre, codes, scale, transposed, bias, second_codes, second_scale, second_transposed = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])
    of_hidden = fp8_input_gradient(rows, second_codes, second_scale, second_transposed, ctx.stored)
    of_pre = fp8_gelu_gradient_rows(of_hidden, pre, bias, scale)
    x = fp8_product_of_outputs(*of_pre, codes, transposed, ctx.stored, gradient.dtype)
    return x.view(*gradient.shape[:-1], codes.shape[1]), *[None] * 8


fp8_feed_forward = operator(_fp8_feed_forward, setup=_setup, backward=_backward)
