"""Triton kernels that quantise whole rows to e4m3 in one read: a row stays in registers from its maximum to its codes.

torch's compiler loops over a row twice and computes twice what the row is made of. The numbers are those of
`fp8.quantise_rows` of what torch computes, rounding of both included, but for a code here and there: the quotient by
the scale is a product with its inverse, and tanh comes from an exponential.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.quantization import fp8
from ltx2_tuner.quantization.kernels import kernels_work

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CODES = torch.float8_e4m3fn
WIDEST = 32768  # values of a row; of more, a program would have to put some aside

if triton is not None:

    @triton.jit
    def _load_row(values, place, column, inside):
        """As float32, zeros outside."""
        return tl.load(values + place + column, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _store_row(values, codes, scales, row, place, column, inside):
        """What `fp8.quantise_rows` makes of a row of float32 values, zeros outside."""
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 0), 448.0), 1e-12)
        # A value that is no number must not become one here: steps with such values are dropped for what they give.
        scaled = tl.clamp(values * (1.0 / scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(codes + place + column, scaled.to(codes.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _load_sum(pre, bias, place, column, inside, BIAS: tl.constexpr):
        """pre + bias, rounded to the dtype of `pre`."""
        dtype = pre.dtype.element_ty
        x = _load_row(pre, place, column, inside)
        if BIAS:
            x = (x + _load_row(bias, 0, column, inside).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        return x

    @triton.jit
    def _gate(x):
        """GELU(x) / x. By tanh it is (1 + tanh(z)) / 2, the sigmoid of 2 z."""
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
        return 1.0 / (1.0 + tl.exp(-2.0 * z))

    @triton.jit
    def _gelu_rows(pre, bias, codes, scales, columns, BIAS: tl.constexpr, BLOCK: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        place, inside = row.to(tl.int64) * columns, column < columns
        x = _load_sum(pre, bias, place, column, inside, BIAS)
        values = (x * _gate(x)).to(pre.dtype.element_ty).to(tl.float32)
        _store_row(values, codes, scales, row, place, column, inside)

    @triton.jit
    def _gelu_gradient_rows(
        gradient, pre, bias, factor, codes, scales, columns, BIAS: tl.constexpr, BLOCK: tl.constexpr
    ):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        place, inside = row.to(tl.int64) * columns, column < columns
        x = _load_sum(pre, bias, place, column, inside, BIAS)
        gate = _gate(x)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)  # of z
        derivative = gate * (1.0 + 2.0 * x * (1.0 - gate) * slope)
        values = _load_row(gradient, place, column, inside) * derivative
        values = values.to(pre.dtype.element_ty).to(tl.float32) * _load_row(factor, 0, column, inside)
        _store_row(values, codes, scales, row, place, column, inside)


def gelu_rows(pre: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantise GELU (by tanh) of pre + bias.

    Args:
        pre: (T, n), n at most WIDEST.
        bias: n values, or None.

    Returns:
        Codes (T, n) in e4m3 and scales (T, 1) in float32.
    """
    return _launch(_gelu_rows, pre, bias, BIAS=bias is not None)


def gelu_gradient_rows(gradient: Tensor, pre: Tensor, bias: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (the gradient of pre) * factor, given that of GELU(pre + bias).

    gradient and pre (T, n), bias (n) or None, factor n values in float32 -> as `gelu_rows`.
    """
    return _launch(_gelu_gradient_rows, gradient, pre, bias, factor, BIAS=bias is not None)


def _launch(kernel: object, *inputs: Tensor | None, **flags: bool) -> tuple[Tensor, Tensor]:
    """The first input has the shape of the result."""
    count, columns = inputs[0].shape
    codes = torch.empty(count, columns, dtype=CODES, device=inputs[0].device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=codes.device)
    block = triton.next_power_of_2(columns)
    # 32 values a thread in registers, two or more programs on a multiprocessor: nothing is spilled (sm_90).
    warps = min(max(block // 512, 4), 16)
    inputs = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    with torch.cuda.device_of(codes):
        kernel[(count,)](*inputs, codes, scales, columns, BLOCK=block, num_warps=warps, **flags)
    return codes, scales


@functools.cache
def available() -> bool:
    """Whether the kernels compile here and agree with torch."""
    return kernels_work(_all_agree, "hidden rows are quantised by torch")


def _all_agree() -> bool:
    generator = torch.Generator("cuda").manual_seed(0)
    pre, gradient = (torch.randn(8, 96, device="cuda", generator=generator).bfloat16() * 3 for _ in range(2))
    bias, factor = pre[0] / 2, gradient[1].float().abs()
    calls = (
        (gelu_rows, plain_gelu_rows, (pre, bias)),
        (gelu_gradient_rows, plain_gelu_gradient_rows, (gradient, pre, bias, factor)),
    )
    return all(_agree(kernel(*given), plain(*given)) for kernel, plain, given in calls)


def _agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Whether codes and scales stand for the same numbers, but for a code here and there."""
    found, expected = (codes.float() * scale for codes, scale in (found, expected))
    return bool((found - expected).norm() <= 0.02 * expected.norm())


def plain_gelu_rows(pre: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`gelu_rows` by torch."""
    return fp8.quantise_rows(F.gelu(_sum(pre, bias), approximate="tanh"))


def plain_gelu_gradient_rows(
    gradient: Tensor, pre: Tensor, bias: Tensor | None, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """`gelu_gradient_rows` by torch."""
    of_pre = torch.ops.aten.gelu_backward(gradient, _sum(pre, bias), approximate="tanh")
    return fp8.quantise_rows(of_pre.float() * factor.view(1, -1))


def _sum(pre: Tensor, bias: Tensor | None) -> Tensor:
    return pre if bias is None else pre + bias.to(pre.dtype)
