"""Recomputation keeps one hidden state of a stream and block, and makes the one in between anew, once."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ltx2_tuner.memory.compilation import PARTS, compile_blocks
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.perturbations import Perturbations, SamplePerturbations
from tests.models.transformer import tiny
from tests.models.transformer.test_memory import adapted_model, outputs_and_gradients

BLOCKS = 3


class Watch:
    """Which parts of which blocks ran, and what the opening ones made.

    Attributes:
        calls: (block, part) in the order in which they ran.
        opened: weak references to the memory of the opening parts' results.
    """

    def __init__(self, model: LTXTransformer) -> None:
        self.calls: list[tuple[int, str]] = []
        self.opened: list[StorageWeakRef] = []
        for index, block in enumerate(model.transformer_blocks):
            for name in PARTS:
                setattr(block, name, self._watched(index, name, getattr(block, name)))

    def _watched(self, index: int, name: str, part: object) -> object:
        def run(*arguments: object, **keywords: object) -> torch.Tensor:
            self.calls.append((index, name))
            result = part(*arguments, **keywords)
            if name.startswith("open"):
                self.opened.append(StorageWeakRef(result.untyped_storage()))
            return result

        return run

    @property
    def alive(self) -> int:
        return sum(not reference.expired() for reference in self.opened)


def three_blocks(compiled: bool = False) -> LTXTransformer:
    """Every block has adapters in its first and second halves."""
    model = adapted_model(num_layers=BLOCKS)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model.transformer_blocks, backend="aot_eager")
    return model


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is freed within the block is freed for want of references."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def loss_of(model: LTXTransformer) -> torch.Tensor:
    torch.manual_seed(7)
    return sum(velocity.square().sum() for velocity in model(**tiny.inputs(model.config)))


def trained(model: LTXTransformer) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_lies_between_the_halves_is_not_kept(compiled: bool) -> None:
    model = three_blocks(compiled)
    model.enable_gradient_checkpointing()
    loss_of(model)  # the first checkpoint of a process imports modules, which keep what was local to their importers
    model.enable_gradient_checkpointing(False)
    watch = Watch(model)
    with no_garbage_collection():
        loss = loss_of(model)
        assert watch.alive >= 2 * BLOCKS - 1, "without recomputation they are kept, but for what needs no gradient"
        del loss
        assert watch.alive == 0
        model.enable_gradient_checkpointing()
        watch.opened.clear()
        loss = loss_of(model)
        assert watch.alive <= 1, "the sound of the first block needs no gradient, so nothing can make it anew"
        loss.backward()
        assert watch.alive == 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_backward_pass_opens_each_block_once_more_and_holds_one_at_a_time(compiled: bool) -> None:
    model = three_blocks(compiled)
    model.enable_gradient_checkpointing()
    watch, held = Watch(model), {}

    def observe(index: int, video: torch.Tensor, audio: torch.Tensor) -> None:
        def note(_: torch.Tensor) -> None:
            held[index] = watch.alive

        video.register_hook(note)

    model.block_outputs = observe
    streams = tiny.inputs(model.config)
    for modality in streams.values():
        modality.latent.requires_grad_()
    with no_garbage_collection():
        loss = sum(velocity.square().sum() for velocity in model(**streams))
        assert watch.alive == 0
        forward = list(watch.calls)
        loss.backward()
        assert watch.alive == 0
    assert set(held) == set(range(BLOCKS)) and max(held.values()) <= 2, "those of one block"
    again = watch.calls[len(forward) :]
    assert sorted(again) == [(index, name) for index in range(BLOCKS) for name in ("open_audio", "open_video")]
    assert [index for index, _ in again] == sorted((index for index, _ in again), reverse=True)


def test_nothing_outlives_a_pass_that_has_no_backward() -> None:
    model = three_blocks()
    model.enable_gradient_checkpointing()
    loss_of(model)
    watch = Watch(model)
    states = []
    model.block_outputs = lambda index, video, audio: states.append(StorageWeakRef(video.untyped_storage()))
    with no_garbage_collection():
        loss = loss_of(model)
        assert not all(state.expired() for state in states)
        del loss
        assert watch.alive == 0
        assert all(state.expired() for state in states)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_parts_that_recompute_by_themselves(compiled: bool) -> None:
    model = three_blocks(compiled)
    model.enable_gradient_checkpointing(keep_products=True)  # then each part keeps its own inputs
    expected = outputs_and_gradients(model)
    model.enable_gradient_checkpointing()
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(outputs_and_gradients(model), expected))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_the_second_opening_runs_in_the_autocast_of_the_first(compiled: bool) -> None:
    results = []
    for recompute in (False, True):
        model = three_blocks(compiled)
        model.enable_gradient_checkpointing(recompute)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        results.append([parameter.grad for parameter in trained(model)])
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_a_graph_can_be_passed_twice() -> None:
    model = three_blocks()
    model.enable_gradient_checkpointing()
    watch = Watch(model)
    loss = loss_of(model)
    first = torch.autograd.grad(loss, trained(model), retain_graph=True)
    assert watch.alive <= 1
    second = torch.autograd.grad(loss, trained(model))
    assert all(torch.equal(*pair) for pair in zip(first, second))


def test_two_passes_may_overlap() -> None:
    model = three_blocks()
    model.enable_gradient_checkpointing()
    single = torch.autograd.grad(loss_of(model), trained(model))
    losses = [loss_of(model) for _ in range(2)]
    both = torch.autograd.grad(sum(losses), trained(model))
    for pair in zip(both, single):
        torch.testing.assert_close(pair[0], 2 * pair[1])


@pytest.mark.slow
def test_blocks_are_compiled_once_for_both_openings() -> None:
    model = three_blocks(compiled=True)
    model.enable_gradient_checkpointing()
    counters = torch._dynamo.utils.counters
    compilations = []
    for _ in range(3):
        counters.clear()
        loss_of(model).backward()
        compilations.append(counters["stats"]["unique_graphs"])
    # The first block's inputs need no gradient: its parts are compiled for themselves.
    assert compilations == [2 * len(PARTS), 0, 0]


def test_streams_and_layers_that_do_not_take_part() -> None:
    """Perturbed blocks, a stream that is only read, a stream alone, and a stream without anything to train."""
    streams = tiny.inputs(tiny.config())
    read_only = {"video": streams["video"], "audio": dataclasses.replace(streams["audio"], enabled=False)}
    sample = SamplePerturbations(skip_video_self=frozenset({1}), skip_a2v="all", skip_v2a=frozenset({0}))
    skipped = Perturbations((sample, SamplePerturbations()))
    for given, perturbations in ((streams, skipped), (read_only, None), ({"video": streams["video"]}, None)):
        found = []
        for recompute in (False, True):
            model = three_blocks()
            for block in model.transformer_blocks:
                block.audio_ff.requires_grad_(False)
            model.enable_gradient_checkpointing(recompute)
            torch.manual_seed(7)
            results = model(given.get("video"), given.get("audio"), perturbations)
            sum(result.square().sum() for result in results if result is not None).backward()
            found.append([parameter.grad for parameter in trained(model)])
        assert all(torch.equal(*pair) for pair in zip(*found))
