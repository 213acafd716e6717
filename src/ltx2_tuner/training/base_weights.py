"""`--base_weights`: LoRAs merged into the checkpoint while it is read, before anything is quantised."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.lora import load_lora
from ltx2_tuner.lora.deltas import WeightDeltas

logger = logging.getLogger(__name__)


def merge_base_weights(weights: Sequence[tuple[Path, float]]) -> WeightDeltas | None:
    """The transform of `load_transformer` that adds the files to the weights; None without any.

    Raises:
        UserError: a file is missing, damaged or no LoRA.
    """
    if not weights:
        return None
    loras = [(load_lora(path), multiplier) for path, multiplier in weights]
    for lora, multiplier in loras:
        logger.info("merging %s at %g into the model (%d modules)", lora.source, multiplier, len(lora.modules))
    return WeightDeltas(loras)
