"""The optimizer, schedule and loop group: conversion and mistakes."""

from __future__ import annotations

import os

import pytest

from ltx2_tuner.cli import arguments_optimizer
from ltx2_tuner.cli.parser import Parser


def parse(*argv: str):
    parser = Parser("test", "test")
    arguments_optimizer.add_arguments(parser)
    return parser.parse_args(list(argv))


def test_the_guides_line():
    args = parse(
        *("--learning_rate", "1e-4", "--audio_lr", "1e-5", "--lr_args", "audio_attn=1e-6", "video_to_audio=5e-6"),
        *("--optimizer_type", "AdamW8bit", "--optimizer_args", "weight_decay=0.1"),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "10%"),
    )
    errors: list[str] = []
    optimizer = arguments_optimizer.optimizer_options(args, errors)
    scheduler = arguments_optimizer.scheduler_options(args, errors)
    assert not errors
    assert (optimizer.learning_rate, optimizer.audio_learning_rate) == (1e-4, 1e-5)
    assert optimizer.lr_args == (("audio_attn", 1e-6), ("video_to_audio", 5e-6))
    assert optimizer.args == {"weight_decay": "0.1"}
    assert (scheduler.name, scheduler.warmup) == ("constant_with_warmup", 0.1)


def test_unset_learning_rate_is_warned_about(caplog):
    assert arguments_optimizer.optimizer_options(parse(), []).learning_rate == 2e-6
    assert "--learning_rate is not given" in caplog.text


def test_mistakes_are_collected():
    args = parse(
        *("--learning_rate", "-1", "--lr_args", "x", "y=1", "--optimizer_type", "AdamV", "--optimizer_args", "z"),
        *("--max_grad_norm", "-1", "--lr_warmup_steps", "5", "--lr_scheduler_args", "q=1"),
    )
    errors: list[str] = []
    arguments_optimizer.optimizer_options(args, errors)
    arguments_optimizer.scheduler_options(args, errors)
    for part in ("--lr_args x", "--optimizer_args z", "AdamV", "--learning_rate", "--max_grad_norm", "constant has no"):
        assert sum(part in error for error in errors) == 1, part
    assert len(errors) == 7


def test_warmup_longer_than_the_run():
    args = parse("--lr_scheduler", "linear", "--lr_warmup_steps", "20", "--max_train_steps", "10")
    errors: list[str] = []
    arguments_optimizer.scheduler_options(args, errors)
    assert "20 is more than the run's 10" in errors[0]


@pytest.mark.parametrize("text", ["abc", "1.5", "-3", "200%"])
def test_bad_spans_are_argument_errors(text, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(f"--lr_warmup_steps={text}")
    assert exit_info.value.code == 2 and "a share (10%)" in capsys.readouterr().err


def test_loop_checks():
    wrong = ("--gradient_accumulation_steps", "0", "--max_train_epochs", "0", "--ddp_timeout", "0")
    errors = arguments_optimizer.loop_errors(parse(*wrong, "--full_fp16", "--full_bf16"), "bf16")
    assert len(errors) == 5 and any("--full_fp16 needs --mixed_precision fp16" in error for error in errors)
    assert arguments_optimizer.loop_errors(parse("--full_bf16"), "bf16") == []


def test_loader_workers():
    errors: list[str] = []
    assert arguments_optimizer.loader_workers(parse("--max_data_loader_n_workers", "100000"), errors) == os.cpu_count()
    assert not errors
    arguments_optimizer.loader_workers(
        parse("--max_data_loader_n_workers", "0", "--persistent_data_loader_workers"), errors
    )
    arguments_optimizer.loader_workers(parse("--max_data_loader_n_workers", "-1"), errors)
    assert len(errors) == 2
