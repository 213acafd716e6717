"""Compiled blocks on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.models.transformer import tiny
from tests.models.transformer.test_memory import adapted_model, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def compiled(model: tiny.LTXTransformer) -> tiny.LTXTransformer:
    for block in model.transformer_blocks:
        block.compile(dynamic=False)
    return model


def test_compiled_blocks_give_what_eager_ones_give() -> None:
    model = tiny.model()
    expected = model(**tiny.inputs(model.config))
    model = compiled(tiny.model().cuda())
    streams = {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config).items()}
    for actual, wanted in zip(model(**streams), expected):
        torch.testing.assert_close(actual.cpu(), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("outside", [False, True], ids=["inside the block", "around the block"])
def test_recomputation_sees_the_same_dropout(outside: bool) -> None:
    model = compiled(adapted_model().cuda())
    if outside:
        model.block_runner = lambda block, index, *arguments: block(*arguments)
    expected = outputs_and_gradients(model, "cuda")
    again = outputs_and_gradients(model, "cuda")
    assert all(torch.equal(*pair) for pair in zip(again, expected)), "the comparison needs one seed, one result"
    model.enable_gradient_checkpointing()
    for pair in zip(outputs_and_gradients(model, "cuda"), expected):
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


def test_no_step_waits_for_the_gpu() -> None:
    model = compiled(adapted_model().cuda())
    outputs_and_gradients(model, "cuda")  # compiles
    model.enable_gradient_checkpointing()
    outputs_and_gradients(model, "cuda")
    streams = {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = model(**streams)
        sum(result.square().sum() for result in results).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
