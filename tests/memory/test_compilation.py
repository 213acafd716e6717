"""How often blocks are compiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from ltx2_tuner.memory.compilation import PARTS
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model
from ltx2_tuner.training.acceleration import accelerate
from tests.memory.blocks import BLOCKS, adapted, gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("streamed", [0, BLOCKS - 2], ids=["resident", "streamed"])
@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_all_blocks_share_one_compilation_of_each_part(weights: str, streamed: int) -> None:
    model, network = adapted(weights)
    expected = gradients(model, network)
    torch._dynamo.reset()
    counters.clear()
    options = CompileOptions(enabled=True, backend="aot_eager")
    plan = prepare_model(model, MemoryOptions(blocks_to_swap=streamed, checkpointing=True), options, CPU)
    accelerate(model, network, plan, torch.float32)
    for _ in range(2):
        for pair in zip(gradients(model, network), expected):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == len(PARTS)
