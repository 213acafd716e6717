"""How the matrices of the transformer blocks are stored, and making a frozen layer in that form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx2_tuner.quantization import fp8, nf4
from ltx2_tuner.quantization.frozen import DenseLinear, Fp8Linear, FrozenLinear, Nf4Linear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightFormat:
    """What block matrices are stored as.

    Attributes:
        kind: "dense", "fp8" or "nf4".
        fp8_scales: "block", "row", or "none" for a plain cast.
        fp8_compute: multiply on the fp8 tensor cores where the device has them; wants row scales.
        keep_transposed: hold a second copy of fp8 weights for the input gradient (with `fp8_compute`).
        nf4_block_size: inputs that share a scale.
    """

    kind: str = "dense"
    fp8_scales: str = "block"
    fp8_compute: bool = False
    keep_transposed: bool = False
    nf4_block_size: int = 32

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "fp8", "nf4"):
            raise ValueError(f"weights are stored as dense, fp8 or nf4, not {self.kind!r}")
        nf4.check_block_size(self.nf4_block_size)


# (name of the weight, weight, column scale) -> its nf4 form; LoftQ puts itself here.
Nf4Quantiser = Callable[[str, Tensor, Tensor | None], nf4.Nf4Tensor]


def freeze(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    form: WeightFormat,
    dtype: torch.dtype,
    *,
    column_scale: Tensor | None = None,
    quantise_nf4: Nf4Quantiser | None = None,
) -> FrozenLinear:
    """The frozen layer of a matrix (out, in), quantised on the device where it lives.

    Args:
        weight: in the dtype of its file, which scales are kept in.
        bias: (out,) or None, in `dtype`.
        dtype: what products are computed in.
        column_scale: (in,) AWQ factors, nf4 only.
        quantise_nf4: takes the place of `nf4.quantise`.
    """
    if form.kind == "fp8":
        codes, scale = fp8.quantise(weight, form.fp8_scales)
        return stored_fp8(codes, scale, bias, form, dtype)
    if form.kind == "nf4":
        if weight.shape[1] % form.nf4_block_size == 0:
            if quantise_nf4 is not None:
                quantised = quantise_nf4(name, weight, column_scale)
            else:
                scaled = weight if column_scale is None else weight.float() * column_scale
                quantised = nf4.quantise(scaled, form.nf4_block_size, weight.dtype)
            return Nf4Linear(quantised, bias, dtype, column_scale)
        logger.warning(
            "%s keeps its precision: its %d inputs are no multiple of %d", name, weight.shape[1], form.nf4_block_size
        )
    return DenseLinear(weight.to(dtype), bias)


def stored_fp8(
    codes: Tensor, scale: Tensor | None, bias: Tensor | None, form: WeightFormat, dtype: torch.dtype
) -> Fp8Linear:
    """The layer of a matrix that is fp8 in its file; codes and scale are used as they are."""
    return Fp8Linear(codes, scale, bias, dtype, form.fp8_compute, form.keep_transposed)
