"""What `accelerate` leaves of a model."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.memory.prepare import MemoryPlan
from ltx2_tuner.quantization.fp8_feed_forward import multiply
from ltx2_tuner.training.acceleration import accelerate
from tests.memory.blocks import adapted


@pytest.mark.parametrize("weights", ["dense", "fp8", "fp8_compute", "nf4"])
def test_feed_forwards_with_fp8_products_are_fused(weights: str) -> None:
    model, network = adapted(weights)
    accelerate(model, network, MemoryPlan(store=None, checkpointing=False, compiled=False), torch.float32)
    fused = [module.multiply is multiply for module in model.feed_forwards]
    assert len(fused) == 2 * len(model.transformer_blocks) and set(fused) == {weights == "fp8_compute"}
