"""Streaming and offloading change no number, and hold only what they say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.memory.compilation import compile_blocks
from ltx2_tuner.memory.streaming import BlockStore, further_indices, streamed_indices
from ltx2_tuner.training.draws import ValidationDraws
from tests.memory.blocks import adapted, gradients
from tests.training.tiny import Clip, Recorder, make_trainer, train, write_checkpoint, write_workspace

BLOCKS = 4
FORMATS = {
    "bf16": ["--dit_dtype", "bfloat16"],
    "fp8": ["--fp8_base", "--fp8_scaled"],
    "nf4": ["--nf4_base"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("streaming") / "tiny.safetensors", layers=BLOCKS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
def test_losses_and_adapters_are_bit_equal(tmp_path, checkpoint, weights, checkpointing):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)])
    flags = ["--ltx2_mode", "av", "--max_train_steps", 2, "--network_dropout", 0.1, *FORMATS[weights]]
    flags += ["--gradient_checkpointing"] if checkpointing else ["--no-gradient_checkpointing"]

    def run(*more):
        trainer = make_trainer(space.arguments(*flags, *more))
        trainer.train()
        return trainer.metrics, trainer.run.network.state_dict()

    expected = run()
    for count, ring in ((1, 2), (2, 2), (BLOCKS - 1, 2), (BLOCKS - 1, 1), (BLOCKS - 1, 3)):
        metrics, state = run("--blocks_to_swap", count, "--block_swap_ring_size", ring)
        assert metrics == expected[0], (count, ring)
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[1][name]), (count, ring, name)


def test_activation_offload_is_bit_equal(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)])
    flags = ["--ltx2_mode", "av", "--gradient_checkpointing", "--network_dropout", 0.1]
    plain = train(space.arguments(*flags))
    offloaded = train(space.arguments(*flags, "--gradient_checkpointing_cpu_offload", "--blocks_to_swap", 2))
    for name in ("loss/current", "grad_norm/total"):
        assert offloaded.values(name) == plain.values(name)


def test_training_and_sampling_alternate(tmp_path, checkpoint):
    """Passes of any length, with and without gradients, in any order."""
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)])
    flags = ["--ltx2_mode", "av", "--max_train_steps", 25]
    plain = train(space.arguments(*flags))

    class Passes:
        def __init__(self):
            self.outputs = []

        def sample(self, transformer, *, step, epoch, label, on_sample):
            batch = next(iter(trainer.run.data))
            prepared = trainer.run.mode.prepare(batch, ValidationDraws("x", 0, trainer.run.draws.sampler))
            first = prepared.run(transformer)
            assert all(torch.equal(a, b) for a, b in zip(first, prepared.run(transformer)))
            self.outputs.append(first)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    more = ["--blocks_to_swap", 3, "--sample_prompts", prompts, "--sample_every_n_steps", 1, "--gemma_root", tmp_path]
    recorder, passes = Recorder(), Passes()
    trainer = make_trainer(space.arguments(*flags, *more), recorder, passes)
    trainer.train()
    assert len(passes.outputs) == 25
    assert recorder.values("loss/current") == plain.values("loss/current")


def test_the_device_holds_the_ring_and_nothing_else_of_streamed_blocks(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    trainer = make_trainer(space.arguments("--blocks_to_swap", 3))
    store = trainer.run.model.block_runner
    assert isinstance(store, BlockStore)
    bases = [slot.buffer.untyped_storage().data_ptr() for slot in store._slots]
    for index in store.streamed:
        for piece in store._pieces[index]:
            assert piece.layer.storage()[piece.name].untyped_storage().data_ptr() in bases
    assert store.device_bytes == 2 * store.host_bytes // 3


@pytest.mark.parametrize(("blocks", "count"), [(48, 1), (48, 24), (48, 47), (2, 1), (5, 3)])
def test_streamed_blocks_are_spread(blocks, count):
    indices = streamed_indices(blocks, count)
    assert len(set(indices)) == count and all(0 <= index < blocks for index in indices)
    gaps = [after - before for before, after in itertools.pairwise(indices)]
    assert not gaps or max(gaps) - min(gaps) <= 1


COMPILED = [*itertools.product(("aot_eager", "aot_eager_decomp_partition"), ("dense", "fp8", "nf4"), (False, True))]
QUICK = [("aot_eager", "fp8", False), ("aot_eager_decomp_partition", "dense", True)]


@pytest.mark.parametrize(
    ("backend", "weights", "recompute"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED if case not in QUICK)],
)
def test_compiled_blocks_see_the_weights_that_are_there_in_the_backward_pass(backend, weights, recompute):
    """What a compiled pass saves of a layer must follow it to another buffer of the ring."""
    expected = gradients(*adapted(weights))
    torch._dynamo.reset()
    model, network = adapted(weights)
    model.block_runner = BlockStore(model.transformer_blocks, [0, 1, 3], torch.device("cpu"))
    model.enable_gradient_checkpointing(recompute)
    compile_blocks(model.transformer_blocks, backend=backend)
    for between in (False, True):  # a pass between forward and backward leaves the blocks in other slots
        for found, wanted in zip(gradients(model, network, between=between), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_free_slots_take_the_blocks_that_come_next():
    model, _ = adapted("dense")
    store = BlockStore(model.transformer_blocks, (0, 1, 3), torch.device("cpu"), ring=2)

    def held(index, direction):
        store.acquire(index, direction)
        return {slot.holds for slot in store._slots}

    assert held(0, 1) == {0, 1}
    assert held(1, 1) == {1, 3}
    assert held(2, 1) == {1, 3}, "the pass ends behind 3; the way back begins with it"
    assert held(3, 1) == {1, 3}
    assert held(3, -1) == {1, 3}
    assert held(2, -1) == {0, 1}, "block 2 lies on the device and leaves both slots to others"


@given(blocks=st.integers(2, 60), data=st.data())
def test_more_blocks_are_streamed_and_none_comes_home(blocks: int, data: st.DataObject) -> None:
    few = data.draw(st.integers(1, blocks - 1))
    many = data.draw(st.integers(few, blocks - 1))
    before = streamed_indices(blocks, few)
    after = further_indices(blocks, before, many)
    assert len(after) == many and set(before) <= set(after) <= set(range(blocks)) and list(after) == sorted(after)
    if many == few:
        assert after == before


def test_further_blocks_lie_far_from_those_that_are_streamed() -> None:
    assert further_indices(12, (2, 3, 4), 5) == (2, 3, 4, 8, 11)
    assert further_indices(8, (), 2) == streamed_indices(8, 2)


@pytest.mark.parametrize(("few", "many"), [(5, 23), (10, 12), (23, 31)])
def test_further_blocks_are_spread_where_all_are_equally_far(few: int, many: int) -> None:
    def longest_run(streamed: tuple[int, ...]) -> int:
        return max(map(len, "".join("x" if index in streamed else "." for index in range(48)).split(".")))

    after = further_indices(48, streamed_indices(48, few), many)
    assert longest_run(after) <= longest_run(streamed_indices(48, many)) + 1
