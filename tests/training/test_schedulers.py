"""Every schedule at 0, w, N/2 and N, and the sentences for what cannot be."""

from __future__ import annotations

import math

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.schedulers import (
    SCHEDULERS,
    FixedRates,
    SchedulerOptions,
    check_scheduler,
    create_scheduler,
    lr_factor,
    parse_span,
    parse_step_rules,
    scheduler_notes,
    span_steps,
)

N, W = 100, 20
HALF = 0.375  # u at N/2: (50 − 20) / 80
COS_HALF = (1 + math.cos(math.pi * HALF)) / 2
# name -> extra options, factors at 0, w, N/2, N
CURVES = {
    "constant_with_warmup": ({}, (0, 1, 1, 1)),
    "linear": ({}, (0, 1, 1 - HALF, 0)),
    "cosine": ({}, (0, 1, COS_HALF, 0)),
    "cosine_with_restarts": ({"cycles": 2}, (0, 1, (1 + math.cos(math.pi * 0.75)) / 2, 0)),
    "polynomial": ({"power": 2.0}, (0, 1, 1e-3 + (1 - 1e-3) * (1 - HALF) ** 2, 1e-3)),
    "inverse_sqrt": ({}, (0, 1, math.sqrt(20 / 50), math.sqrt(20 / 100))),
    "cosine_with_min_lr": ({"min_lr_ratio": 0.1}, (0, 1, 0.1 + 0.9 * COS_HALF, 0.1)),
    "warmup_stable_decay": (
        {"decay": 60, "min_lr_ratio": 0.2},
        (0, 1, 0.2 + 0.8 * (1 + math.cos(math.pi / 6)) / 2, 0.2),
    ),
    "piecewise_constant": ({"args": {"step_rules": "1:30,0.5:60,0.01"}}, (0, 1, 0.5, 0.01)),
    "rex": ({}, (0.01, 1, 0.01 + 0.99 * 0.625 / (0.1 + 0.9 * 0.625), 0.01)),
}


def test_every_schedule_has_a_curve_here():
    assert CURVES.keys() | {"constant", "adafactor"} == SCHEDULERS.keys()


@pytest.mark.parametrize("name", CURVES)
def test_factors(name):
    extra, expected = CURVES[name]
    factor = lr_factor(SchedulerOptions(name, warmup=W, **extra), N, learning_rate=1e-4)
    assert [factor(step) for step in (0, W, N // 2, N)] == pytest.approx(expected, abs=1e-12)
    start = expected[0]
    assert factor(W // 2) == pytest.approx(start + (1 - start) / 2)


@pytest.mark.parametrize("name", CURVES)
def test_without_warmup_the_first_step_is_full(name):
    extra, _ = CURVES[name]
    assert lr_factor(SchedulerOptions(name, **extra), N)(0) == pytest.approx(1.0)


def test_constant_is_one_everywhere():
    factor = lr_factor(SchedulerOptions(), N)
    assert {factor(step) for step in range(N + 1)} == {1.0}


def test_inverse_sqrt_default_timescale():
    assert lr_factor(SchedulerOptions("inverse_sqrt"), N)(N) == pytest.approx(math.sqrt(10_000 / 10_100))
    assert lr_factor(SchedulerOptions("inverse_sqrt", timescale=50), N)(50) == pytest.approx(math.sqrt(0.5))


def test_rex_arguments():
    options = SchedulerOptions("rex", min_lr_ratio=0.0, args={"rex_alpha": "0.5", "rex_beta": "0.5"})
    assert lr_factor(options, N)(50) == pytest.approx(0.5 / 0.75)


@pytest.mark.parametrize(
    ("text", "span"), [("100", 100), ("0", 0), ("0.1", 0.1), ("10%", 0.1), ("0%", 0.0), ("0.0", 0.0)]
)
def test_spans(text, span):
    assert parse_span(text) == span and type(parse_span(text)) is type(span)


@pytest.mark.parametrize("text", ["-1", "1.5", "110%", "x", "%", "", "nan"])
def test_spans_that_are_none(text):
    with pytest.raises(ValueError):
        parse_span(text)


def test_a_ratio_of_the_run():
    assert span_steps(parse_span("29%"), 100) == 29
    factor = lr_factor(SchedulerOptions("linear", warmup=0.1), 200)
    assert factor(10) == pytest.approx(0.5) and factor(20) == 1.0


@pytest.mark.parametrize("text", ["", "1:10", "1:20,0.5:10,0.1", "a:10,1", "1:10:3,1"])
def test_step_rules_that_are_none(text):
    with pytest.raises(ValueError):
        parse_step_rules(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SchedulerOptions("constant", warmup=5), "constant has no warm-up; use --lr_scheduler constant_with_warmup"),
        (SchedulerOptions("cosin"), "did you mean 'cosine'"),
        (SchedulerOptions("cosine_with_min_lr"), "needs --lr_scheduler_min_lr_ratio"),
        (SchedulerOptions("warmup_stable_decay"), "needs --lr_decay_steps"),
        (SchedulerOptions("piecewise_constant"), "in the form 1:10,0.1:20,0.01"),
        (SchedulerOptions("linear", args={"x": "1"}), "linear does not take it"),
        (SchedulerOptions("linear", warmup=101), "101 is more than the run's 100 optimizer steps"),
        (SchedulerOptions("warmup_stable_decay", warmup=60, decay=60), "are more than the run's 100 steps"),
        (SchedulerOptions("cosine_with_min_lr", min_lr_ratio=2.0), "from 0 to 1"),
        (SchedulerOptions(custom_class="StepLR"), "give a class with its package"),
        (SchedulerOptions("polynomial", power=-1.0), "--lr_scheduler_power -1: give a number of at least 0"),
        (SchedulerOptions("cosine_with_restarts", cycles=0), "--lr_scheduler_num_cycles 0: give at least 1"),
        (SchedulerOptions("inverse_sqrt", timescale=0), "--lr_scheduler_timescale 0: give at least 1"),
        (SchedulerOptions(custom_class="nowhere.Foo"), "no module nowhere"),
        (SchedulerOptions(custom_class="torch.optim.lr_scheduler.StepLR"), "step_size"),
        (SchedulerOptions(custom_class="torch.optim.lr_scheduler.StepLR", args={"stepsize": "1"}), "'step_size'"),
    ],
)
def test_mistakes(options, message):
    (error,) = check_scheduler(options, N)
    assert message in error
    with pytest.raises(UserError, match="--lr_"):
        create_scheduler(sgd(), options, N, 1e-4)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (SchedulerOptions("linear", decay=5, cycles=2), ["--lr_decay_steps", "--lr_scheduler_num_cycles"]),
        (SchedulerOptions("linear", power=2.0, timescale=3), ["--lr_scheduler_power", "--lr_scheduler_timescale"]),
        (SchedulerOptions("cosine", min_lr_ratio=0.1), ["--lr_scheduler_min_lr_ratio"]),
        (SchedulerOptions("rex", min_lr_ratio=0.1, warmup=3), []),
        (SchedulerOptions("warmup_stable_decay", decay=5, cycles=2, min_lr_ratio=0.1, warmup=3), []),
        (SchedulerOptions("linear", custom_class="a.B", warmup=3), ["--lr_scheduler linear", "--lr_warmup_steps"]),
    ],
)
def test_what_the_schedule_does_not_read(options, flags):
    (note,) = scheduler_notes(options) or [""]
    assert all(flag in note for flag in flags) and note.count("--") == len(flags) + (options.custom_class is not None)


def sgd(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (1e-4,)]
    return torch.optim.SGD(groups)


def test_factors_multiply_each_groups_own_rate():
    optimizer = sgd(1e-4, 1e-5)
    scheduler = create_scheduler(optimizer, SchedulerOptions("linear"), 10, 1e-4)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([5e-5, 5e-6])


def test_state_goes_on_where_it_was():
    options = SchedulerOptions("cosine", warmup=3)
    optimizer = sgd()
    scheduler = create_scheduler(optimizer, options, 10, 1e-4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    again = create_scheduler(sgd(), options, 10, 1e-4)
    again.load_state_dict(scheduler.state_dict())
    scheduler.step(), again.step()
    assert again.get_last_lr() == scheduler.get_last_lr()


def test_custom_class():
    options = SchedulerOptions(custom_class="torch.optim.lr_scheduler.StepLR", args={"step_size": "2", "gamma": "0.5"})
    optimizer = sgd()
    scheduler = create_scheduler(optimizer, options, 10, 1e-4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([5e-5])


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("torch.optim.lr_scheduler.StpLR", {}, "has no class StpLR"),
        ("no_such_package_here.Class", {}, "pip install no_such_package_here"),
        ("torch.optim.lr_scheduler.StepLR", {"stepsize": "2"}, "did you mean 'step_size'"),
        ("torch.optim.lr_scheduler.StepLR", {}, "step_size"),
    ],
)
def test_custom_class_mistakes(path, args, message):
    with pytest.raises(UserError, match=message):
        create_scheduler(sgd(), SchedulerOptions(custom_class=path, args=args), 10, 1e-4)


def test_schedule_free_optimizers_have_no_schedule():
    class AdamWScheduleFree(torch.optim.SGD):
        pass

    optimizer = AdamWScheduleFree([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = create_scheduler(optimizer, SchedulerOptions("cosine"), 10, 1e-4)
    assert isinstance(scheduler, FixedRates)
    optimizer.step()
    scheduler.step()
    scheduler.load_state_dict(scheduler.state_dict())
    assert scheduler.get_last_lr() == [3e-4]


def test_adafactor_needs_its_optimizer():
    with pytest.raises(UserError, match="--optimizer_type Adafactor"):
        create_scheduler(sgd(), SchedulerOptions("adafactor"), 10, 1e-4)
