"""NaN in a batch: skipped and counted, fatal when it goes on, never saved (R8)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.errors import UserError
from ltx2_tuner.training import loop
from ltx2_tuner.training.guard import LIMIT, NonFiniteGuard
from ltx2_tuner.training.optimizers import drops_by_itself
from ltx2_tuner.training.saving import check_finite
from ltx2_tuner.training.window import LossScaler
from tests.training.poison import poisoned_trainer
from tests.training.tiny import Clip, make_trainer, write_workspace


def assert_finite_files(folder) -> None:
    files = list(folder.glob("**/*.safetensors"))
    assert files
    for path in files:
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor.float()).all(), f"{path.name}: {name}"


def test_one_bad_batch_of_a_hundred_is_skipped(tmp_path, checkpoint, caplog):
    space = write_workspace(tmp_path, checkpoint, [Clip(grid=(1, 1, 1))] * 4)
    trainer, recorder = poisoned_trainer(space, {57}, "--max_train_steps", 99, "--save_state")
    trainer.train()
    assert trainer.progress.step == 99
    assert trainer.progress.micro_batches == 100
    assert trainer.run.guard.dropped == 1
    losses = recorder.values("loss/current")
    assert len(losses) == 99 and all(loss == loss for loss in losses)
    assert "the step is skipped (1 so far): datasets" in caplog.text
    assert_finite_files(space.output)


@pytest.mark.parametrize("place", [0, 2], ids=["the first step", "a later one"])
def test_a_fused_optimizer_drops_the_same_steps(tmp_path, checkpoint, monkeypatch, place):
    """It is told on the device, before the host knows; what is trained and what is kept of it are the same."""
    space = write_workspace(tmp_path, checkpoint, [Clip(grid=(1, 1, 1))] * 4)
    flags = ["--max_train_steps", 4, "--optimizer_args", "fused=True", "weight_decay=0.1", "--learning_rate", 0.01]
    found = []
    for ahead in (True, False):
        monkeypatch.setattr(loop, "drops_by_itself", drops_by_itself if ahead else lambda _optimizer: False)
        trainer, recorder = poisoned_trainer(space, {place}, *flags)
        trainer.train()
        optimizer = trainer.run.optimizer
        assert drops_by_itself(optimizer) and not hasattr(optimizer, "found_inf")
        assert trainer.run.guard.dropped == 1 and trainer.progress.step == 4
        assert {state["step"].item() for state in optimizer.state.values()} == {4}
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        values = [*trainer.run.network.parameters(), *moments]
        found.append((recorder.values("loss/current"), values))
    (losses, values), (expected_losses, expected) = found
    assert losses == expected_losses and all(torch.equal(*pair) for pair in zip(values, expected, strict=True))
    assert_finite_files(space.output)


@pytest.mark.parametrize(
    ("optimizer", "ahead"),
    [
        (("AdamW", "fused=True"), True),
        (("Adam", "fused=True"), True),
        (("AdamW",), False),
        (("SGD", "fused=True", "momentum=0.9"), False),
    ],
    ids=["AdamW fused", "Adam fused", "AdamW", "SGD fused"],
)
def test_only_optimizers_that_drop_steps_unharmed_are_begun_early(tmp_path, checkpoint, optimizer, ahead):
    space = write_workspace(tmp_path, checkpoint)
    name, *keywords = optimizer
    flags = ["--max_train_steps", 2, "--optimizer_type", name, *(("--optimizer_args", *keywords) if keywords else ())]
    trainer, _ = poisoned_trainer(space, {0}, *flags)
    assert drops_by_itself(trainer.run.optimizer) is ahead
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.run.network.parameters())


@pytest.mark.parametrize("before", [False, True])
def test_a_state_may_come_from_an_optimizer_that_was_not_fused(tmp_path, checkpoint, before):
    """A resumed state brings its own switches."""
    space = write_workspace(tmp_path, checkpoint)
    flags = ["--max_train_steps", 2, "--save_state", "--optimizer_args"]
    first, _ = poisoned_trainer(space, set(), *flags, f"fused={before}")
    first.train()
    (state,) = space.output.glob("*-state")
    flags = ["--max_train_steps", 4, "--resume", state, "--optimizer_args"]
    second, _ = poisoned_trainer(space, set(), *flags, f"fused={not before}")
    second.train()
    assert second.progress.step == 4


def test_a_bad_batch_drops_its_whole_window(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, [Clip(grid=(1, 1, 1))] * 4)
    trainer, _ = poisoned_trainer(space, {1}, "--gradient_accumulation_steps", 2, "--max_train_steps", 1)
    trainer.train()
    assert trainer.progress.micro_batches == 4
    assert trainer.run.guard.dropped == 1


def test_the_schedule_does_not_move_with_skipped_steps(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, [Clip(grid=(1, 1, 1))] * 4)
    flags = ["--lr_scheduler", "linear", "--max_train_steps", 4]
    clean, clean_log = poisoned_trainer(space, set(), *flags)
    clean.train()
    bad, bad_log = poisoned_trainer(space, {1}, *flags)
    bad.train()
    assert bad_log.values("lr/unet") == clean_log.values("lr/unet")


def test_nothing_but_bad_batches_stops_after_ten(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    trainer, _ = poisoned_trainer(space, None)
    with pytest.raises(UserError, match="10 steps in a row"):
        trainer.train()
    assert trainer.progress.step == 0
    assert trainer.run.guard.dropped == LIMIT
    assert not list(space.output.glob("**/*.safetensors"))


def test_nan_check_error_stops_at_once(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    trainer, _ = poisoned_trainer(space, {1}, "--nan_check", "error")
    with pytest.raises(UserError, match="not finite in a step on datasets"):
        trainer.train()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["off", "warn"])
def test_even_unchecked_an_adapter_of_nans_is_not_written(tmp_path, checkpoint, mode, fused):
    space = write_workspace(tmp_path, checkpoint)
    flags = ["--nan_check", mode, "--save_state", "--optimizer_args", f"fused={fused}"]
    trainer, _ = poisoned_trainer(space, {1}, *flags)
    with pytest.raises(UserError, match="was not written"):
        trainer.train()
    assert not list(space.output.glob("**/*.safetensors"))


def test_ten_in_a_row_are_counted_from_the_last_good_one():
    guard = NonFiniteGuard()
    for _ in range(LIMIT - 1):
        assert not guard.accept(False, ["a"])
    assert guard.accept(True, ["b"])
    assert not guard.accept(False, ["a"])
    restored = NonFiniteGuard()
    restored.load_state(guard.state())
    assert restored == guard


def test_infinite_values_count_as_bad():
    with pytest.raises(UserError, match="up"):
        check_finite({"up": torch.tensor([1.0, float("inf")])}, "the adapter")


def test_an_overflow_in_half_precision_halves_the_scale_and_goes_on(tmp_path, checkpoint):
    """A scale that is too large drops steps until it fits; it used to stay, and the second drop was a traceback."""
    space = write_workspace(tmp_path, checkpoint)
    trainer = make_trainer(space.arguments("--mixed_precision", "fp16", "--max_train_steps", 6))
    trainer.run.scaler = LossScaler("cpu", init_scale=2.0**22)
    trainer.train()
    assert trainer.progress.step == 6 and 1 < trainer.run.guard.dropped < 10
    assert trainer.run.scaler.get_scale() == 2.0 ** (22 - trainer.run.guard.dropped)
