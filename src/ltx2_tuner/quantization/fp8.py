"""FP8 (e4m3) weights with scales, and products on the fp8 tensor cores.

A weight is `codes * scale`. Scales are one per 64 inputs of a row ("block", the most accurate), one per row ("row",
what row-scaled tensor-core products need), one per matrix (files of others) or none (a plain cast).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ltx2_tuner.devices import exact
from ltx2_tuner.quantization import kernels

FP8_MAX = 448.0
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 64
MIN_SCALE = 1e-8


def quantise(weight: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """Quantise (out, in) on the device where it lives.

    Args:
        mode: "block" (rows whose length is no multiple of 64 fall back to "row"), "row", or "none" for a plain cast.

    Returns:
        Codes (out, in) float8_e4m3fn and scale: (out, in / 64, 1), (out, 1) or None, in the dtype of the weight.
    """
    if mode == "none":
        return _cast(weight.float().nan_to_num(0.0)), None
    rows, columns = weight.shape
    blockwise = mode == "block" and columns % BLOCK == 0
    groups = weight.float().view(rows, columns // BLOCK, BLOCK) if blockwise else weight.float()
    scale = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_(min=MIN_SCALE)
    return _cast((groups / scale).nan_to_num_(0.0)).view(rows, columns), scale.to(weight.dtype)


def dequantise(codes: Tensor, scale: Tensor | None, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Codes (out, in) and a scale of shape [], [1], (out, 1) or (out, blocks, 1) -> matrix (out, in).

    The product is rounded once, whatever the dtypes. out: contiguous, where the matrix is to be.
    """
    if codes.is_cuda and kernels.available():  # three times as fast as a cast, even without a scale
        return kernels.expand_fp8(codes, torch.ones(1, device=codes.device) if scale is None else scale, dtype, out)
    dense = _dequantised(codes, scale, dtype)
    return dense if out is None else out.copy_(dense)


def _dequantised(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return codes.to(dtype)
    wide = dtype if scale.dtype == dtype and scale.dim() else torch.float32  # bf16 holds the codes exactly
    scale = scale.to(wide)
    if scale.dim() == 3:
        groups = codes.to(wide).view(scale.shape[0], scale.shape[1], -1)
        return (groups * scale).to(dtype).view(codes.shape)
    return (codes.to(wide) * scale).to(dtype)


def quantise_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (tokens, width) -> codes of that shape and float32 scales (tokens, 1), one per row."""
    values = values.float()
    scale = (values.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
    return _cast(values / scale), scale


def product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K) times the transpose of (N, K), both fp8 with a float32 scale per row, (M, 1) and (N, 1) -> (M, N)."""
    if left.is_cuda:
        result = torch._scaled_mm(
            left, right.t(), scale_a=left_scale, scale_b=right_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return result.to(dtype)
    return ((left.float() @ right.float().t()) * left_scale * right_scale.t()).to(dtype)


def has_fp8_products(device: torch.device | str) -> bool:
    """Whether `device` multiplies row-scaled fp8 matrices."""
    device = exact(device)
    return device.type == "cuda" and _probe(device.index)


@functools.cache
def _probe(index: int) -> bool:
    if torch.cuda.get_device_capability(index) < (8, 9):
        return False
    codes = torch.ones(32, 32, device=f"cuda:{index}").to(torch.float8_e4m3fn)
    scale = torch.full((32, 1), 0.5, device=codes.device)
    try:
        found = product(codes, scale, codes, scale, torch.float32)
    except RuntimeError:
        return False
    return bool((found == 8.0).all())


def _cast(values: Tensor) -> Tensor:
    """float32 -> e4m3 with saturation: the plain cast overflows to NaN."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
