"""LoftQ in a run: the values its adapters start from, kept beside the output and taken out of what ComfyUI gets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx2_tuner.checkpoint.loftq_file import save_loftq
from ltx2_tuner.checkpoint.precision import PrecisionOptions
from ltx2_tuner.files import tensor_bytes
from ltx2_tuner.lora import LoRANetwork
from ltx2_tuner.lora.formats import LoRAMatrices, parse, to_original

logger = logging.getLogger(__name__)

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LoftQStart:
    """What adapters began with, by layer path: down (r, in), up (out, r), scale 1. digest: of the start values."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    digest: str

    def taken_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """kohya's keys of the adapter minus its start product, for a model that was not quantised; rank 2r."""
        modules = parse(tensors).modules
        for path, (down, up) in self.matrices.items():
            module = modules[path]
            down = torch.cat([module.down.float().cpu(), down])
            up = torch.cat([module.up.float().cpu() * module.scale, -up], dim=1)
            modules[path] = LoRAMatrices(down, up, float(down.shape[0]))
        return to_original(modules)


def keep_start(network: nn.Module, values: Factors, precision: PrecisionOptions, path: Path | None) -> LoftQStart:
    """Remember what the adapters start from; call it before anything is resumed.

    Args:
        values: LoftQ's start values by layer path.
        path: where to write them, None for nowhere.
    """
    if path is not None:
        size = precision.weights.nf4_block_size
        save_loftq(path, values, rank=precision.loftq_rank, iterations=precision.loftq_iterations, block_size=size)
        logger.info("the values that LoftQ starts from: %s", path.name)
    matrices = {}
    if isinstance(network, LoRANetwork):
        for layer, adapter in network.adapters():
            if layer in values:
                down = adapter.lora_down.weight.detach().float().cpu().clone()
                matrices[layer] = (down, adapter.lora_up.weight.detach().float().cpu() * adapter.scale)
    return LoftQStart(matrices, _digest(values))


def _digest(values: Factors) -> str:
    digest = hashlib.sha256()
    for layer in sorted(values):
        digest.update(layer.encode())
        for tensor in values[layer]:
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]
