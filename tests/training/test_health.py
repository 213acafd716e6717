"""Adapters that nobody would want to use are pointed out when they are saved, also in runs without samples."""

from __future__ import annotations

import logging

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.modes.base import Prepared
from ltx2_tuner.training.options import SaveOptions
from ltx2_tuner.training.saving import CheckpointWriter, Moment
from tests.training.tiny import Clip, Recorder, make_trainer, train, write_workspace


@pytest.fixture
def space(tmp_path, checkpoint):
    return write_workspace(tmp_path, checkpoint, [Clip()] * 2)


def test_a_usual_run_is_not_commented(space, caplog):
    train(space.arguments("--save_every_n_steps", 2, "--max_train_steps", 4))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "adapter" in record.msg]


def test_an_adapter_that_learned_nothing_is_pointed_out(space, caplog):
    trainer = make_trainer(space.arguments(), Recorder())
    trainer._save(Moment("step", 1, 1))
    assert "nothing has been learned yet" in caplog.text


def test_values_that_break_the_model_are_pointed_out(space, caplog):
    trainer = make_trainer(space.arguments("--max_train_steps", 1), Recorder())
    trainer.train()
    with torch.no_grad():
        for _, adapter in trainer.run.network.adapters():
            adapter.lora_up.weight.fill_(1e20)
            adapter.lora_down.weight.fill_(1e20)
    trainer._save(Moment("step", 1, 1))
    assert "with the adapter the model predicts values that are no numbers; the plain model does not" in caplog.text
    assert "the adapter's norm grew from" in caplog.text


@pytest.mark.parametrize(("strength", "warned"), [(0.5, False), (3.0, True)])
def test_an_adapter_that_does_harm_is_pointed_out(space, caplog, monkeypatch, strength, warned):
    """Against predictions that are exact without the adapter but for a known error."""
    trainer = make_trainer(space.arguments("--max_train_steps", 1), Recorder())
    trainer.train()
    network, enabled = trainer.run.network, lambda: next(network.adapters())[1].enabled

    def run(prepared, model):
        return prepared.video_task.target + (strength if enabled() else 1.0), None

    monkeypatch.setattr(Prepared, "run", run)
    trainer._save(Moment("step", 1, 1))
    assert ("the adapter's loss is 9 and the plain model's 1: it does harm" in caplog.text) == warned
    assert enabled()


def test_values_that_the_saved_precision_cannot_hold_are_not_written(tmp_path):
    tensors = {
        "lora_unet_model_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.full((2, 4), 1e30),
        "lora_unet_model_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(4, 2),
        "lora_unet_model_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(2.0),
    }
    writer = CheckpointWriter(SaveOptions(tmp_path, "x", precision="fp16"))
    with pytest.raises(UserError, match=r"x\.safetensors in --save_precision fp16 holds NaN or infinite values"):
        writer.save(Moment("final", 1, 1), tensors, {}, {})
    assert not list(tmp_path.iterdir())


def test_looking_changes_nothing(space):
    plain = train(space.arguments("--network_dropout", 0.2))
    saved = train(space.arguments("--network_dropout", 0.2, "--save_every_n_steps", 1, "--output_name", "b"))
    assert plain.values("loss/current") == saved.values("loss/current")
