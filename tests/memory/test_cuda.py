"""Streaming and offloading on a GPU: the same numbers, copies one way only, and no more memory than promised."""

from __future__ import annotations

import logging

import pytest
import torch

from ltx2_tuner.memory.offload import ActivationOffload
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model, rearrange
from ltx2_tuner.memory.streaming import BlockStore
from ltx2_tuner.memory.two_streams import TwoStreams
from tests.memory.blocks import BLOCKS, adapted, gradients
from tests.models.transformer.test_opening import Watch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
EAGER = CompileOptions(enabled=False)


def on_gpu(weights: str):
    return adapted(weights, "cuda", torch.bfloat16)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weights", ["dense", "fp8", "nf4"])
def test_streaming_is_bit_equal(weights: str, recompute: bool) -> None:
    model, network = on_gpu(weights)
    model.enable_gradient_checkpointing(recompute)
    expected = gradients(model, network, "cuda")
    for count, ring in ((1, 2), (2, 2), (BLOCKS - 1, 2), (BLOCKS - 1, 1), (BLOCKS - 1, 3)):
        model, network = on_gpu(weights)
        prepare_model(model, MemoryOptions(blocks_to_swap=count, ring_size=ring, checkpointing=recompute), EAGER, CUDA)
        for _ in range(3):
            assert equal(gradients(model, network, "cuda"), expected), (count, ring)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weights", ["dense", "fp8", "nf4"])
def test_compiled_streaming_is_close(weights: str, recompute: bool) -> None:
    """In float32: compiled code rounds to bf16 in fewer places."""
    model, network = adapted(weights, "cuda", torch.float32)
    expected = gradients(model, network, "cuda")
    torch._dynamo.reset()
    model, network = adapted(weights, "cuda", torch.float32)
    options = MemoryOptions(blocks_to_swap=BLOCKS - 1, checkpointing=recompute)
    assert prepare_model(model, options, CompileOptions(enabled=True), CUDA).compiled
    for _ in range(3):
        for found, wanted in zip(gradients(model, network, "cuda"), expected):
            error = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
            assert error < 1e-4


def test_passes_with_and_without_gradients_alternate() -> None:
    model, network = on_gpu("fp8")
    expected = gradients(model, network, "cuda")
    model, network = on_gpu("fp8")
    prepare_model(model, MemoryOptions(blocks_to_swap=BLOCKS - 1, checkpointing=True), EAGER, CUDA)
    for _ in range(50):
        with torch.no_grad():
            model(**inputs(model))
        assert equal(gradients(model, network, "cuda"), expected)


def inputs(model) -> dict:
    from tests.models.transformer import tiny

    return {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config).items()}


def test_weights_travel_one_way() -> None:
    from torch.profiler import ProfilerActivity, profile

    model, network = on_gpu("nf4")
    prepare_model(model, MemoryOptions(blocks_to_swap=BLOCKS - 1, checkpointing=True), EAGER, CUDA)
    gradients(model, network, "cuda")
    streams = inputs(model)
    network.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        sum(output.float().square().mean() for output in model(**streams)).backward()
        torch.cuda.synchronize()
    kinds = [event.name for event in profiler.events() if event.name.startswith("Memcpy")]
    assert not [name for name in kinds if "DtoH" in name]
    copies = [name for name in kinds if "HtoD" in name]
    assert 0 < len(copies) <= 2 * (BLOCKS - 1) + 2, "one copy a block and pass"


def test_memory_that_cannot_be_locked_is_staged(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    model, network = on_gpu("fp8")
    expected = gradients(model, network, "cuda")

    class Refusing:
        def __getattr__(self, name: str):
            return lambda *arguments: 2

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    model, network = on_gpu("fp8")
    with caplog.at_level(logging.WARNING):
        plan = prepare_model(model, MemoryOptions(blocks_to_swap=BLOCKS - 1, checkpointing=True), EAGER, CUDA)
    assert "cannot be page-locked" in caplog.text
    assert all(slot.staging is not None and slot.staging.is_pinned() for slot in plan.store._slots)
    for _ in range(3):
        assert equal(gradients(model, network, "cuda"), expected)


def test_other_blocks_can_be_streamed_later() -> None:
    model, network = on_gpu("nf4")
    expected = gradients(model, network, "cuda")
    plan = prepare_model(model, MemoryOptions(), EAGER, CUDA)
    for count in (1, 3, 2):
        plan = rearrange(model, plan, MemoryOptions(blocks_to_swap=count, checkpointing=True), CUDA)
        assert isinstance(model.block_runner, BlockStore) and len(plan.store.streamed) == count
        assert equal(gradients(model, network, "cuda"), expected)
    plan.store.close()


def test_offloaded_inputs_change_nothing() -> None:
    model, network = on_gpu("dense")
    expected = gradients(model, network, "cuda")
    model.enable_gradient_checkpointing(saved_inputs=ActivationOffload(CUDA))
    for _ in range(5):
        assert equal(gradients(model, network, "cuda"), expected)
    outputs = model(**inputs(model))
    assert all(output.is_cuda for output in outputs)


def test_two_streams_make_anew_what_lies_between_the_halves_of_blocks() -> None:
    model, network = on_gpu("dense")
    on_one = gradients(model, network, "cuda")
    model.block_runner = TwoStreams()
    expected = gradients(model, network, "cuda")
    for found, wanted in zip(expected, on_one):  # sound comes first on two streams: sums in bf16 in another order
        assert (found.float() - wanted.float()).norm() < 0.05 * wanted.float().norm()
    model.enable_gradient_checkpointing()
    watch = Watch(model)
    loss = sum(output.float().square().mean() for output in model(**inputs(model)))
    assert len(watch.opened) == 2 * BLOCKS and watch.alive == 0
    del loss
    for _ in range(20):
        assert equal(gradients(model, network, "cuda"), expected)


def test_the_device_holds_the_ring_instead_of_the_blocks() -> None:
    model, _ = on_gpu("dense")
    before = torch.cuda.memory_allocated()
    plan = prepare_model(model, MemoryOptions(blocks_to_swap=BLOCKS - 1, ring_size=1), EAGER, CUDA)
    freed = before - torch.cuda.memory_allocated()
    assert freed >= 0.6 * plan.store.host_bytes * (BLOCKS - 2) / (BLOCKS - 1)
