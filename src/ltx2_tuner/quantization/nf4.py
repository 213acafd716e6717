"""NF4: 16 values fitted to a normal distribution, one scale per block of inputs, two codes a byte.

The codes are those of `bitsandbytes.functional.quantize_4bit(..., quant_type="nf4", compress_statistics=False)` bit
for bit, so its CUDA kernels can read them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx2_tuner.quantization import kernels

CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
MIN_SCALE = 1e-8
_BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Nf4Tensor:
    """A quantised matrix: codes uint8 (out, in / 2), even element in the high half; scale (out, in / block, 1)."""

    codes: Tensor
    scale: Tensor

    @property
    def block_size(self) -> int:
        return 2 * self.codes.shape[1] // self.scale.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) that the codes stand for."""
        return dequantise(self.codes, self.scale, dtype)


def check_block_size(block_size: int) -> None:
    """ValueError unless the size is a power of two from 16 on."""
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"nf4_block_size must be 16, 32, 64, 128 or a higher power of two, not {block_size}")


def quantise(weight: Tensor, block_size: int = 32, scale_dtype: torch.dtype | None = None) -> Nf4Tensor:
    """Quantise (out, in), `in` a multiple of `block_size`, on the device where it lives.

    Scales are kept in `scale_dtype`, by default that of the weight.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // block_size, block_size)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_(min=MIN_SCALE)
    codes = torch.bucketize(blocks / scale, _midpoints(weight.device), out_int32=True)
    codes = codes.to(torch.uint8).reshape(rows, columns // 2, 2)
    return Nf4Tensor((codes[..., 0] << 4) | codes[..., 1], scale.to(scale_dtype or weight.dtype))


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Codes (out, in / 2) and scales (out, in / block, 1) -> matrix (out, in): value * scale in float32, then cast.

    out: contiguous, where the matrix is to be.
    """
    if codes.is_cuda and kernels.available():
        return kernels.expand_nf4(codes, scale, _codebook(codes.device), dtype, out)
    dense = _dequantised(codes, scale, dtype)
    return dense if out is None else out.copy_(dense)


def _dequantised(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, half = codes.shape
    block_size = 2 * half // scale.shape[1]
    if codes.is_cuda and block_size in _BITSANDBYTES_BLOCKS and _has_bitsandbytes():
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes.reshape(-1, 1), scale.float().reshape(-1), block_size, "nf4", (rows, 2 * half), dtype
        )
    pairs = _byte_table(codes.device)[codes.int()]  # (out, in / 2, 2)
    dense = pairs.view(rows, scale.shape[1], block_size) * scale.float()
    return dense.to(dtype).view(rows, 2 * half)


@functools.cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


@functools.cache
def _midpoints(device: torch.device) -> Tensor:
    values = _codebook(torch.device("cpu"))
    return ((values[1:] + values[:-1]) / 2).to(device)


@functools.cache
def _byte_table(device: torch.device) -> Tensor:
    """The two values of each byte, (256, 2)."""
    byte = torch.arange(256)
    return _codebook(torch.device("cpu"))[torch.stack((byte >> 4, byte & 15), 1)].to(device)


@functools.cache
def _has_bitsandbytes() -> bool:
    """Whether bitsandbytes loads and its kernel agrees with the codebook on this machine."""
    try:
        import bitsandbytes  # noqa: F401

        codes = torch.arange(256, dtype=torch.uint8, device="cuda").reshape(-1, 1)
        scale = torch.ones(16, device="cuda")
        found = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, 32, "nf4", (1, 512), torch.float32)
        return torch.equal(found.view(256, 2), _byte_table(codes.device))
    except Exception:  # a missing package, a build without this GPU's kernels: plain torch does the same
        return False
