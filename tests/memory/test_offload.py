"""Hidden states in host memory between forward and backward: the same gradients, and memory that is used again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from ltx2_tuner.lora import LoRANetwork
from ltx2_tuner.memory import offload
from ltx2_tuner.memory.host_memory import HostMemory
from ltx2_tuner.memory.offload import ActivationOffload
from ltx2_tuner.memory.two_streams import TwoStreams
from ltx2_tuner.models.transformer import LTXTransformer
from tests.memory import blocks
from tests.memory.paper import Paper
from tests.models.transformer import tiny

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all host memory that is taken."""
    sizes = []

    class Noted(HostMemory):
        def __init__(self, size: int) -> None:
            sizes.append(size)
            super().__init__(size)

    monkeypatch.setattr(offload, "HostMemory", Noted)
    return sizes


def loss(model: LTXTransformer, batch: int, seed: int) -> Tensor:
    outputs = model(**tiny.inputs(model.config, batch=batch, seed=seed))
    return sum(output.square().mean() for output in outputs)


def gradients(network: LoRANetwork) -> list[Tensor]:
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    return found


def expected(model: LTXTransformer, network: LoRANetwork, *passes: tuple[int, int]) -> list[Tensor]:
    """Of passes that keep everything where it is."""
    model.enable_gradient_checkpointing(False)
    for batch, seed in passes:
        loss(model, batch, seed).backward()
    return gradients(network)


def test_passes_of_any_size_use_the_same_memory(made: list[int]) -> None:
    model, network = blocks.adapted("dense")
    shapes = (1, 2, 3)
    wanted = {batch: expected(model, network, (batch, 7)) for batch in shapes}
    model.enable_gradient_checkpointing(saved_inputs=ActivationOffload(CPU))
    for batch in (2, 1, 3, 2, 1, 3, 3):
        loss(model, batch, 7).backward()
        for pair in zip(gradients(network), wanted[batch]):
            assert torch.equal(*pair)
    assert len(made) == 2 * 2 * blocks.BLOCKS  # a state a stream and block, at first, and larger ones once


def test_passes_that_wait_for_each_other_have_memory_of_their_own(made: list[int]) -> None:
    model, network = blocks.adapted("dense")
    wanted = expected(model, network, (2, 7), (2, 8), (2, 9))
    model.enable_gradient_checkpointing(saved_inputs=ActivationOffload(CPU))
    first, second = loss(model, 2, 7), loss(model, 2, 8)
    first.backward()
    third = loss(model, 2, 9)
    second.backward()
    third.backward()
    for pair in zip(gradients(network), wanted):
        torch.testing.assert_close(*pair)
    assert len(made) == 2 * 2 * blocks.BLOCKS


def test_a_pass_without_a_backward_pass_gives_its_memory_back(made: list[int]) -> None:
    model, _ = blocks.adapted("dense")
    model.enable_gradient_checkpointing(saved_inputs=ActivationOffload(CPU))
    for seed in range(3):
        loss(model, 2, seed)
        gc.collect()
    assert len(made) == 2 * blocks.BLOCKS


def test_what_has_no_bytes_stays_where_it_is(made: list[int]) -> None:
    """Checkpoints of torch up to 2.11 save an empty tensor beside their arguments."""
    empty = torch.empty(0, requires_grad=True)
    with ActivationOffload(CPU)():
        result = empty.exp()
    result.sum().backward()
    assert empty.grad.shape == (0,) and not made


@pytest.mark.parametrize("streams", [1, 2])
def test_the_device_lets_go_of_hidden_states_in_the_forward_pass(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    Paper(monkeypatch)
    model, network = blocks.adapted("dense")
    wanted = expected(model, network, (2, 7))
    if streams == 2:
        model.block_runner = TwoStreams()
    seen = []
    for block in model.transformer_blocks:
        for name in ("open_video", "open_audio"):
            monkeypatch.setattr(block, name, _noting(getattr(block, name), seen))
    for saved, alive in (({}, 2 * blocks.BLOCKS), ({"saved_inputs": ActivationOffload(CPU)}, 0)):
        model.enable_gradient_checkpointing(**saved)
        seen.clear()
        value = loss(model, 2, 7)
        gc.collect()
        assert len(seen) == 2 * blocks.BLOCKS and sum(state() is not None for state in seen) == alive
        value.backward()
        for pair in zip(gradients(network), wanted):
            torch.testing.assert_close(*pair)


def _noting(part, seen: list):
    """A part of a block that notes the hidden state it is given."""

    def run(hidden: Tensor, *arguments: object, **keywords: object) -> Tensor:
        seen.append(weakref.ref(hidden))
        return part(hidden, *arguments, **keywords)

    return run
