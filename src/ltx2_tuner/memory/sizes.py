"""Bytes of the frozen weights, worked out from the model's shapes before any of them is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization.formats import WeightFormat
from ltx2_tuner.quantization.targets import is_quantisable


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of one block and of everything outside of the blocks.

    expanded: the dense matrices of a block whose stored ones are expanded for each product; 0 where none are.
    """

    blocks: int
    block: int
    rest: int
    expanded: int


def weight_sizes(model: LTXTransformer, weights: WeightFormat, dtype: torch.dtype) -> WeightSizes:
    """Sizes of a model (which may be on the meta device) whose matrices are stored in a format."""
    sizes = {"block": 0, "rest": 0}
    expanded = 0
    expands = weights.kind != "dense" and not weights.fp8_compute
    for name, parameter in model.named_parameters():
        kind = "block" if name.startswith("transformer_blocks.") else "rest"
        sizes[kind] += _stored_bytes(name, parameter, weights, dtype)
        if expands and kind == "block" and is_quantisable(name, tuple(parameter.shape)):
            expanded += parameter.numel() * dtype.itemsize
    blocks = len(model.transformer_blocks)
    return WeightSizes(blocks, sizes["block"] // blocks, sizes["rest"], expanded // blocks)


def _stored_bytes(name: str, parameter: torch.Tensor, weights: WeightFormat, dtype: torch.dtype) -> int:
    count = parameter.numel()
    if weights.kind == "dense" or not is_quantisable(name, tuple(parameter.shape)):
        return count * dtype.itemsize
    if weights.kind == "fp8":
        return count * (2 if weights.keep_transposed else 1) + count // 32
    return count // 2 + 2 * count // weights.nf4_block_size
