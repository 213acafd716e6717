"""`--base_weights`: LoRAs merged into the checkpoint while it is read, before anything is quantised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ltx2_tuner.lora import LoRAFile, load_lora

logger = logging.getLogger(__name__)


def merge_base_weights(
    weights: Sequence[tuple[Path, float]],
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """The transform of `load_transformer` that adds multiplier * alpha/r * up @ down to each weight, in float32.

    Raises:
        UserError: a file is missing, damaged or no LoRA.
    """
    loras: list[tuple[LoRAFile, float]] = [(load_lora(path), multiplier) for path, multiplier in weights]
    for lora, multiplier in loras:
        logger.info("merging %s at %g into the model (%d modules)", lora.source, multiplier, len(lora.modules))

    def merge(name: str, weight: torch.Tensor) -> torch.Tensor:
        path = name.removesuffix(".weight")
        deltas = [lora.modules[path].delta(factor) for lora, factor in loras if path in lora.modules]
        if not deltas:
            return weight
        return (weight.float() + sum(deltas).to(weight.device)).to(weight.dtype)

    return merge
