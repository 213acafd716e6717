"""What a run says about itself, and that it says so once."""

from __future__ import annotations

import time

import pytest
import torch

from ltx2_tuner.training.notes import RunNotes, memory_note
from tests.training.tiny import Clip, train, write_workspace

CPU = torch.device("cpu")
GIB = 2**30


def test_pace_and_an_unusual_loss_are_told_after_twenty_steps(tmp_path, checkpoint, caplog):
    """The tiny model knows nothing, so its losses are those of a model that does not fit its caches."""
    caplog.set_level("INFO")
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)] * 2)
    train(space.arguments("--ltx2_mode", "av", "--max_train_steps", 41))
    assert caplog.text.count("the first 20 steps: ") == 1 and "s/step" in caplog.text
    for name in ("loss/video", "loss/audio"):
        assert caplog.text.count(f"{name} is ") == 1
    assert "--ltx_version" in caplog.text


@pytest.mark.parametrize(("loss", "start", "told"), [(0.4, 1, False), (1.6, 1, True), (1.6, 101, False)])
def test_a_usual_start_and_a_resumed_run_are_not_judged(caplog, loss, start, told):
    notes = RunNotes(CPU)
    for number in range(start, start + 30):
        notes.step(number, {"loss/video": loss, "perf/step_seconds": 1.0})
    assert ("where a model that fits its data" in caplog.text) == told


def test_overfitting_is_told_after_three_rises(caplog):
    notes = RunNotes(CPU)
    curve = [(1.0, 1.0), (1.1, 0.9), (1.2, 0.8), (1.1, 0.7), (1.2, 0.6), (1.3, 0.5)]
    for measured, average in curve:
        gap = notes.validation({"val_loss": measured}, average)["val_loss/gap"]
        assert gap == pytest.approx(measured - average)
    assert "overfits" not in caplog.text, "two rises, a fall and two rises"
    notes.validation({"val_loss": 1.4}, 0.4)
    notes.validation({"val_loss": 1.5}, 0.3)
    assert caplog.text.count("val_loss rose 3 times in a row, to 1.4, while the training loss fell to 0.4") == 1
    assert notes.validation({}, 0.3) == {}, "no item gave a finite loss"


def test_validation_that_rises_with_the_training_loss_is_no_overfitting(caplog):
    notes = RunNotes(CPU)
    for loss in (1.0, 1.1, 1.2, 1.3, 1.4):
        notes.validation({"val_loss": loss}, loss)
    assert "overfits" not in caplog.text


@pytest.mark.parametrize(
    ("used", "swapped", "expected"),
    [
        (23.9, 10, "--blocks_to_swap 14"),
        (23.9, 0, "memory is full (100 %)"),
        (12.0, 10, "50 % of the device memory stay free: a --blocks_to_swap below 10"),
        (12.0, 0, None),
        (22.0, 10, None),
    ],
)
def test_memory(used, swapped, expected):
    note = memory_note(int(used * GIB), 24 * GIB, swapped)
    assert note is None if expected is None else expected in note


def test_the_gap_is_logged(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, validation=[Clip()])
    found = train(space.arguments("--validate_every_n_steps", 2))
    gaps = [loss - average for loss, average in zip(found.values("val_loss"), found.values("loss/average")[1::2])]
    assert found.values("val_loss/gap") == pytest.approx(gaps)


def test_time_for_samples_is_no_steps_time(tmp_path, checkpoint):
    class Slow:
        def sample(self, transformer, **_more):
            time.sleep(1.5)

    space = write_workspace(tmp_path, checkpoint)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox", encoding="utf-8")
    flags = ("--sample_at_first", "--sample_every_n_steps", 2, "--sample_prompts", prompts, "--gemma_root", tmp_path)
    assert max(train(space.arguments(*flags), Slow()).values("perf/step_seconds")) < 1.5
