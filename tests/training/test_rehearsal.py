"""A run that does not fit is made to fit before its first step, and learns the same."""

from __future__ import annotations

import collections
import logging

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.streaming import BlockStore
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.training import rehearsal
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.rehearsal import Arrangement
from tests.training.tiny import Clip, Recorder, make_trainer, write_checkpoint, write_workspace

BLOCKS = 4


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    checkpoint = write_checkpoint(folder / "tiny.safetensors", layers=BLOCKS)
    return write_workspace(folder, checkpoint, [Clip(sound=17), Clip(grid=(3, 4, 4), sound=9)])


def train(space, *flags: object) -> tuple[Recorder, Trainer]:
    recorder = Recorder()
    common = ["--ltx2_mode", "av", "--network_dropout", 0.1, "--audio_loss_balance_mode", "ema_mag"]
    trainer = make_trainer(space.arguments(*common, *flags), recorder)
    trainer.train()
    return recorder, trainer


def same(first: tuple[Recorder, Trainer], second: tuple[Recorder, Trainer]) -> bool:
    (one, left), (other, right) = first, second
    losses = one.values("loss/current") == other.values("loss/current")
    pairs = zip(left.run.network.parameters(), right.run.network.parameters())
    return losses and all(torch.equal(*pair) for pair in pairs)


def fail_until(monkeypatch, fits) -> list[tuple[int, int]]:
    """Training passes run out of memory until `fits(streamed, recomputed)`; returns what was tried."""
    tried, forward = [], LTXTransformer.forward

    def limited(model, *arguments):
        if model.training and torch.is_grad_enabled():
            runner = model.block_runner
            streamed = len(runner.streamed) if isinstance(runner, BlockStore) else 0
            tried.append((streamed, len(model._checkpointed)))
            if not fits(*tried[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return forward(model, *arguments)

    monkeypatch.setattr(LTXTransformer, "forward", limited)
    return tried


@pytest.mark.parametrize("weights", [[], ["--fp8_base", "--fp8_scaled"], ["--nf4_base"]], ids=["full", "fp8", "nf4"])
def test_it_recomputes_and_then_streams_until_it_fits(space, monkeypatch, caplog, weights):
    plain = train(space, *weights)
    caplog.set_level(logging.INFO)
    tried = fail_until(monkeypatch, lambda streamed, recomputed: streamed >= 3)
    found = train(space, *weights, "--vram_budget", 100)
    assert tried[0] == (0, 0) and (0, 3) in tried and tried[-1][0] == 3, "fewer than the ring holds save nothing"
    assert "memory plan: 3 of 4 blocks streamed, 4 recomputed" in caplog.text
    assert same(plain, found)


def test_some_blocks_may_be_enough(space, monkeypatch):
    plain = train(space)
    tried = fail_until(monkeypatch, lambda streamed, recomputed: recomputed >= 1)
    found = train(space, "--vram_budget", 100)
    assert tried[-1][0] == 0 and 0 < tried[-1][1] < BLOCKS
    assert same(plain, found)


def test_a_plan_without_room_for_recorded_passes_is_not_taken(space, monkeypatch, caplog):
    """Passes that are not recorded take several times as long; so the next plan is tried while there is one."""
    plain = train(space)
    tried = []

    def crowded(arrangement):
        tried.append((arrangement.plan.choice.streamed, arrangement.plan.choice.recomputed))
        return tried[-1][1] < 2

    monkeypatch.setattr(Arrangement, "crowded", property(crowded))
    found = train(space, "--vram_budget", 100)
    assert tried[0] == (0, 0) and tried[-1] == (0, 2) and len(tried) == 3
    assert "it leaves no room for recorded passes" in caplog.text
    assert same(plain, found)


def test_a_plan_that_cannot_even_be_arranged_is_passed_over(space, monkeypatch, caplog):
    plain = train(space)
    fail_until(monkeypatch, lambda streamed, recomputed: recomputed >= 1)
    arranged, rearrange = [], rehearsal.rearrange

    def short_of_memory(model, plan, options, device):
        arranged.append(options.recomputed_blocks)
        if len(arranged) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return rearrange(model, plan, options, device)

    monkeypatch.setattr(rehearsal, "rearrange", short_of_memory)
    found = train(space, "--vram_budget", 100)
    assert arranged[:2] == [1, 2] and len(found[1].run.model._checkpointed) == 2
    assert "the next plan cannot be arranged" in caplog.text
    assert same(plain, found)


def test_a_rehearsal_changes_nothing(space, monkeypatch):
    plain = train(space)
    rehearsed = []
    rehearse = Trainer.rehearse
    monkeypatch.setattr(Trainer, "rehearse", lambda trainer, batch: (rehearsed.append(batch), rehearse(trainer, batch)))
    found = train(space, "--vram_budget", 100)
    assert [batch["latents"]["latents"].shape[2:] for batch in rehearsed] == [(3, 4, 4)], "the largest bucket"
    assert same(plain, found)


def test_gradients_of_a_step_s_first_pass_are_there_in_its_second(space, monkeypatch):
    plain = train(space, "--gradient_accumulation_steps", 2)
    there, rehearse = [], Trainer.rehearse

    def watched(trainer, batch):
        there.append(any(parameter.grad is not None for parameter in trainer.run.network.parameters()))
        rehearse(trainer, batch)

    monkeypatch.setattr(Trainer, "rehearse", watched)
    found = train(space, "--gradient_accumulation_steps", 2, "--vram_budget", 100)
    assert there == [False, True]
    assert same(plain, found)


def test_a_typed_flag_is_kept_and_the_failure_is_told(space, monkeypatch):
    tried = fail_until(monkeypatch, lambda streamed, recomputed: False)
    with pytest.raises(torch.OutOfMemoryError):
        train(space, "--vram_budget", 100, "--blocks_to_swap", 1, "--no-gradient_checkpointing")
    assert tried == [(1, 0)]


def test_streamed_sets_can_change(space):
    """Blocks come home and others leave, the ring shrinks, and the numbers stay."""
    plain = train(space)
    recorder = Recorder()
    common = ["--ltx2_mode", "av", "--network_dropout", 0.1, "--audio_loss_balance_mode", "ema_mag"]
    trainer = make_trainer(space.arguments(*common, "--blocks_to_swap", 1, "--block_swap_ring_size", 3), recorder)
    store, blocks = trainer.run.model.block_runner, trainer.run.model.transformer_blocks
    buffer = store.device_bytes // 3
    for streamed, ring in (([0, 3], 3), ([1, 2, 3], 2), ([1, 2], 1)):
        store.restream(blocks, streamed, ring)
        assert store.streamed == tuple(streamed)
        assert len(store._host) == len(streamed)
        assert store.device_bytes == ring * buffer
        matrices = [blocks[index].attn1.to_q for index in streamed]
        bound = {(getattr(layer, "base", layer)).weight.untyped_storage().data_ptr() for layer in matrices}
        assert bound <= {slot.buffer.untyped_storage().data_ptr() for slot in store._slots}
    trainer.train()
    assert same(plain, (recorder, trainer))


@pytest.mark.parametrize("share", [0.5, 1.5, 3.0])
def test_a_save_that_does_not_fit_the_disk_stops_the_run_at_the_start(space, monkeypatch, caplog, share):
    arguments = space.arguments("--ltx2_mode", "av", "--save_state")
    values = sum(parameter.numel() for parameter in make_trainer(arguments).run.network.parameters())
    save = values * 4 * (2 + 3)  # two files, and a state of the adapter with two moments
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, round(share * save)))
    if share < 1:
        with pytest.raises(UserError, match="GB are free and a save takes"):
            make_trainer(arguments)
    else:
        make_trainer(arguments)
        assert ("room for one" in caplog.text) == (share < 2)
