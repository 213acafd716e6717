"""Triton kernels that expand stored weights in one pass: bytes and scales in, the dense matrix out.

They give the numbers of the plain torch code bit for bit. `available` says whether this machine can run them; Triton
comes with torch on Linux and needs a C compiler there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

_BLOCK = 2048

if triton is not None:

    @triton.jit
    def _expand_fp8(codes, scales, out, columns, group, row_stride, E5M2: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        bits = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.uint16)
        if E5M2:
            value = (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            # The bits of e4m3 are those of a half with 8 less in the exponent, below normal numbers, too.
            half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
        scale = tl.load(scales + row * row_stride + column // group, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, (value * scale).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _expand_nf4(codes, scales, codebook, out, count, group, BLOCK: tl.constexpr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of a byte, that is of two numbers
        inside = index < count
        pair = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + (2 * index) // group, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(codebook + (pair >> 4)) * scale
        second = tl.load(codebook + (pair & 15)) * scale
        both = tl.interleave(first, second)
        position = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        tl.store(out + position, both.to(out.dtype.element_ty), mask=position < 2 * count)


def expand_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Codes (out, in) in an fp8 dtype and a scale of shape [], [1], (out, 1) or (out, blocks, 1) -> (out, in)."""
    rows, columns = codes.shape
    groups = scale.shape[1] if scale.dim() == 3 else 1
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device) if out is None else out
    with torch.cuda.device(codes.device):
        _expand_fp8[(rows, triton.cdiv(columns, _BLOCK))](
            codes.contiguous().view(torch.uint8),
            scale.contiguous(),
            out,
            columns,
            columns // groups,
            0 if scale.numel() == 1 else groups,
            E5M2=codes.dtype == torch.float8_e5m2,
            BLOCK=_BLOCK,
        )
    return out


def expand_nf4(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Codes (out, in / 2), scales (out, in / block, 1) and the 16 values in float32 -> (out, in)."""
    rows, half = codes.shape
    out = torch.empty(rows, 2 * half, dtype=dtype, device=codes.device) if out is None else out
    with torch.cuda.device(codes.device):
        _expand_nf4[(triton.cdiv(codes.numel(), _BLOCK),)](
            codes.contiguous(),
            scale.contiguous(),
            codebook,
            out,
            codes.numel(),
            2 * half // scale.shape[1],
            BLOCK=_BLOCK,
        )
    return out


@functools.cache
def available() -> bool:
    """Whether the kernels compile here and agree with torch."""
    return kernels_work(_agree, "stored weights are expanded by torch")


def _agree() -> bool:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(16, 16)
    scale = torch.full((16, 1), 0.5, device="cuda")
    found = expand_fp8(codes.view(torch.float8_e4m3fn), scale, torch.float32)
    return torch.equal(found.nan_to_num(), (codes.view(torch.float8_e4m3fn).float() * scale).nan_to_num())


def kernels_work(agree: Callable[[], bool], instead: str) -> bool:
    """Whether there is a GPU with Triton on which some kernels compile and give what they should.

    Args:
        agree: runs them and compares.
        instead: what is done without them, for the log.
    """
    if triton is None or not torch.cuda.is_available():
        return False
    try:
        return agree()
    except Exception as error:  # no C compiler, an unknown GPU...: plain operations do the same
        logger.info("no Triton kernels here (%s); %s", str(error).splitlines()[:1], instead)
        return False
