"""Optimizers by every kind of name, their keywords and what is said about mistakes."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.optimizers import (
    OptimizerOptions,
    check_optimizer,
    create_optimizer,
    describe_optimizer,
    optimizer_path,
    scheduler_warnings,
)
from ltx2_tuner.training.schedulers import SchedulerOptions, create_scheduler


def parameter_groups(*rates: float) -> list[dict]:
    torch.manual_seed(0)
    return [{"params": [torch.nn.Parameter(torch.randn(64, 80))], "lr": rate} for rate in rates or (1e-3,)]


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", ["AdamW", "adamw", "ADAMW", "torch.optim.AdamW"])
def test_adamw_by_any_name_steps_each_group_at_its_rate(name):
    groups = parameter_groups(1e-3, 1e-2)
    before = [group["params"][0].detach().clone() for group in groups]
    optimizer = create_optimizer(OptimizerOptions(name, {"weight_decay": "0"}, 1e-3), groups)
    step(optimizer)
    for group, old, rate in zip(groups, before, (1e-3, 1e-2)):
        torch.testing.assert_close(group["params"][0].detach(), old - rate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW8bit", "pagedadamw8bit", "Adam8bit", "PagedAdam8bit", "Lion8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_8bit_optimizers_move_parameters(name):
    pytest.importorskip("bitsandbytes")
    groups = parameter_groups()
    before = groups[0]["params"][0].detach().clone()
    optimizer = create_optimizer(OptimizerOptions(name, {}, 1e-3), groups)
    step(optimizer)
    moved = before - groups[0]["params"][0].detach()
    assert moved.mean().item() == pytest.approx(1e-3, rel=0.1)
    assert any(
        state.dtype == torch.uint8
        for state in optimizer.state[groups[0]["params"][0]].values()
        if hasattr(state, "dtype")
    )


def test_other_torch_optimizers_by_bare_name():
    assert optimizer_path("adamax") == "torch.optim.Adamax"
    options = OptimizerOptions("SGD", {"momentum": "0.9", "nesterov": "true"}, 1e-2)
    optimizer = create_optimizer(options, parameter_groups())
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"] is True
    assert describe_optimizer(optimizer, options) == "torch.optim.sgd.SGD(momentum=0.9,nesterov=true)"


def test_literals_and_tuples():
    optimizer = create_optimizer(OptimizerOptions("AdamW", {"betas": "(0.9, 0.95)", "eps": "1e-6"}), parameter_groups())
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OptimizerOptions("AdamWW"), "did you mean 'adamw'"),
        (OptimizerOptions("AdamW", {"weight_decy": "0"}), "did you mean 'weight_decay'.*it takes lr, betas"),
        (OptimizerOptions("no_such_package_here.Opt"), "pip install no_such_package_here"),
        (OptimizerOptions("torch.optim.Nothing"), "no class Nothing"),
        (OptimizerOptions("torch.nn.Linear"), "is no optimizer class"),
        (OptimizerOptions("AdamW", {"betas": "0.9"}), "--optimizer_type AdamW: .*; correct --optimizer_args"),
        (OptimizerOptions("AdamW", {"betas": "(2.0, 0.9)"}), "Invalid beta"),
        (OptimizerOptions(learning_rate=-1.0), "--learning_rate -1.0"),
        (OptimizerOptions(audio_learning_rate=float("nan")), "--audio_lr nan"),
        (OptimizerOptions(max_grad_norm=-1.0), "--max_grad_norm"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(options, message):
    (error,) = check_optimizer(options)
    with pytest.raises(UserError, match=message):
        raise UserError(error)


@pytest.mark.parametrize(
    ("name", "package"), [("Lion", "lion-pytorch"), ("prodigy", "prodigyopt"), ("CAME", "came-pytorch")]
)
def test_missing_packages_are_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, optimizer_path(name).split(".")[0], None)  # as if it were not installed
    with pytest.raises(UserError, match=f"pip install {package}"):
        create_optimizer(OptimizerOptions(name), parameter_groups())


def test_values_the_class_refuses_are_a_user_error():
    with pytest.raises(UserError, match="Invalid beta"):
        create_optimizer(OptimizerOptions("AdamW", {"betas": "(2.0, 0.9)"}), parameter_groups())


def test_nothing_to_train():
    with pytest.raises(UserError, match="every learning rate is 0"):
        create_optimizer(OptimizerOptions(), [])


def test_muon_takes_matrices():
    if not hasattr(torch.optim, "Muon"):
        with pytest.raises(UserError, match=r"torch 2\.9"):
            create_optimizer(OptimizerOptions("muon"), parameter_groups())
    else:
        step(create_optimizer(OptimizerOptions("muon"), parameter_groups()))


def test_adafactor_finds_its_rate():
    pytest.importorskip("transformers")
    optimizer = create_optimizer(OptimizerOptions("adafactor", {}, 1e-4), parameter_groups(1e-4))
    assert optimizer.defaults["relative_step"] is True and optimizer.param_groups[0]["lr"] is None
    scheduler = create_scheduler(optimizer, SchedulerOptions("constant"), 10, 1e-4)
    assert type(scheduler).__name__ == "AdafactorSchedule"
    step(optimizer)
    scheduler.step()
    assert scheduler_warnings(optimizer, "constant", 1.0) == []
    assert "has no effect" in scheduler_warnings(optimizer, "cosine", 1.0)[0]


def test_adafactor_with_a_given_rate():
    pytest.importorskip("transformers")
    options = OptimizerOptions("Adafactor", {"relative_step": "False", "scale_parameter": "False"}, 1e-4)
    optimizer = create_optimizer(options, parameter_groups(1e-4))
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert len(scheduler_warnings(optimizer, "cosine", 1.0)) == 2
    assert scheduler_warnings(optimizer, "constant_with_warmup", 0.0) == []


def test_adafactor_warmup_init_forces_relative_step():
    pytest.importorskip("transformers")
    options = OptimizerOptions("Adafactor", {"relative_step": "False", "warmup_init": "True"})
    assert create_optimizer(options, parameter_groups()).defaults["relative_step"] is True


def test_prodigy_is_told_its_rate(caplog, monkeypatch):
    import sys
    import types

    class Prodigy(torch.optim.SGD):
        pass

    monkeypatch.setitem(sys.modules, "prodigyopt", types.SimpleNamespace(Prodigy=Prodigy))
    with caplog.at_level(logging.WARNING):
        create_optimizer(OptimizerOptions("Prodigy", {}, 1e-4), parameter_groups())
    assert "Prodigy expects lr 1.0" in caplog.text
