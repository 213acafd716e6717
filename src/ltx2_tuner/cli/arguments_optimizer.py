"""The optimizer, schedule and loop group of the training scripts (08 section 5.4)."""

from __future__ import annotations

import argparse
import logging
import os

from ltx2_tuner.cli.key_values import parse_key_values
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.groups import parse_lr_args
from ltx2_tuner.training.optimizers import DEFAULT_LEARNING_RATE, OptimizerOptions, check_optimizer, optimizer_path
from ltx2_tuner.training.schedulers import (
    SCHEDULERS,
    SchedulerOptions,
    Span,
    check_scheduler,
    parse_span,
    scheduler_notes,
)

logger = logging.getLogger(__name__)

_EPS_TOO_SMALL = ("torch.optim.AdamW", "torch.optim.Adam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group."""
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_schedule(parser.add_argument_group("learning-rate schedule"))
    _add_loop(parser.add_argument_group("training loop"))


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--learning_rate", type=float, help=f"learning rate (default {DEFAULT_LEARNING_RATE}; 1e-4 is usual for LoRA)")
    add("--audio_lr", type=float, help="of modules whose name contains audio_ (default: --learning_rate)")
    add(
        "--lr_args",
        nargs="*",
        metavar="PATTERN=LR",
        help="by regular expression in the module name; longest match wins",
    )
    add("--optimizer_type", default="AdamW", help="AdamW, AdamW8bit, Adafactor, Lion, Prodigy, … or a class path")
    add("--optimizer_args", nargs="*", metavar="KEY=VALUE", help="keywords of the optimizer, such as weight_decay=0.01")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this global norm; 0: not at all")


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr_scheduler", default="constant", choices=list(SCHEDULERS), help="schedule")
    add("--lr_warmup_steps", type=_span, default=0, metavar="N", help="warm-up: steps, a ratio below 1, or 10%%")
    add("--lr_decay_steps", type=_span, default=0, metavar="N", help="decay of warmup_stable_decay, in the same forms")
    add("--lr_scheduler_num_cycles", type=int, default=1, help="restarts or half waves of the cosine schedules")
    add("--lr_scheduler_power", type=float, default=1.0, help="power of polynomial")
    add("--lr_scheduler_timescale", type=int, help="of inverse_sqrt, in steps (default: warm-up, or 10000)")
    add("--lr_scheduler_min_lr_ratio", type=float, help="lowest factor of the schedules that have one")
    add("--lr_scheduler_type", metavar="CLASS", help="package.module.Class in place of --lr_scheduler")
    add("--lr_scheduler_args", nargs="*", metavar="KEY=VALUE", help="its keywords; step_rules of piecewise_constant")


def _add_loop(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gradient_accumulation_steps", type=int, default=1, metavar="G", help="batches per optimizer step")
    add("--max_train_steps", type=int, default=1600, metavar="N", help="optimizer steps of the whole run")
    add("--max_train_epochs", type=int, metavar="E", help="epochs of the whole run; overrides --max_train_steps")
    add("--max_data_loader_n_workers", type=int, default=8, metavar="N", help="loader processes, at most the CPUs")
    either = argparse.BooleanOptionalAction
    add("--persistent_data_loader_workers", action=either, help="keep loader processes between epochs (default: on)")
    add("--ddp_timeout", type=int, metavar="MINUTES", help="how long a process waits for the others")
    no_effect = "accepted without effect: gradients meet in one piece, without torch's DDP"
    add("--ddp_gradient_as_bucket_view", action="store_true", help=no_effect)
    add("--ddp_static_graph", action="store_true", help=no_effect)
    add("--full_fp16", action="store_true", help="adapters in fp16 (needs --mixed_precision fp16)")
    add("--full_bf16", action="store_true", help="adapters in bf16 (needs --mixed_precision bf16)")


def _span(text: str) -> Span:
    try:
        return parse_span(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}': give steps (100), a ratio below 1 (0.1) or a share (10%)"
        ) from None


def optimizer_options(args: argparse.Namespace, errors: list[str]) -> OptimizerOptions:
    """The optimizer as options; `errors` gets a sentence for each mistake."""
    before = len(errors)
    lr_args: list[tuple[str, float]] = []
    for token in args.lr_args or ():
        try:
            lr_args += parse_lr_args([token])
        except UserError as error:
            errors.append(str(error))
    options = OptimizerOptions(
        type=args.optimizer_type,
        args=parse_key_values(args.optimizer_args, "--optimizer_args", errors),
        learning_rate=DEFAULT_LEARNING_RATE if args.learning_rate is None else args.learning_rate,
        audio_learning_rate=args.audio_lr,
        lr_args=tuple(lr_args),
        max_grad_norm=args.max_grad_norm,
    )
    found = check_optimizer(options)
    if args.full_fp16 and not found and "eps" not in options.args and optimizer_path(options.type) in _EPS_TOO_SMALL:
        found.append(f"--full_fp16: {options.type}'s eps of 1e-8 is 0 in fp16; add --optimizer_args eps=1e-4")
    errors += found
    if args.learning_rate is None and len(errors) == before:
        logger.warning("--learning_rate is not given: %g is used; 1e-4 is usual for LoRA", DEFAULT_LEARNING_RATE)
    return options


def scheduler_options(args: argparse.Namespace, errors: list[str]) -> SchedulerOptions:
    """The schedule as options; `errors` gets a sentence for each mistake that does not depend on the run's length."""
    options = SchedulerOptions(
        name=args.lr_scheduler,
        warmup=args.lr_warmup_steps,
        decay=args.lr_decay_steps,
        cycles=args.lr_scheduler_num_cycles,
        power=args.lr_scheduler_power,
        timescale=args.lr_scheduler_timescale,
        min_lr_ratio=args.lr_scheduler_min_lr_ratio,
        custom_class=args.lr_scheduler_type,
        args=parse_key_values(args.lr_scheduler_args, "--lr_scheduler_args", errors),
    )
    errors += check_scheduler(options, None if args.max_train_epochs else args.max_train_steps)
    for note in scheduler_notes(options):
        logger.warning("--lr_scheduler: %s", note)
    return options


def loader_workers(args: argparse.Namespace, errors: list[str]) -> int:
    """Number of loader processes, between 0 and the CPUs."""
    wanted = args.max_data_loader_n_workers
    if wanted < 0:
        errors.append(f"--max_data_loader_n_workers {wanted}: give 0 or more")
    if args.persistent_data_loader_workers and wanted == 0:
        errors.append("--persistent_data_loader_workers needs --max_data_loader_n_workers above 0")
    return max(0, min(wanted, os.cpu_count() or 1))


def loop_errors(args: argparse.Namespace, mixed_precision: str) -> list[str]:
    """Sentences for mistakes in the counts and the low-precision flags of the loop."""
    errors = []
    counts = {
        "--gradient_accumulation_steps": args.gradient_accumulation_steps,
        "--max_train_steps": args.max_train_steps,
        "--max_train_epochs": args.max_train_epochs,
    }
    errors += [f"{flag} {count}: give at least 1" for flag, count in counts.items() if count is not None and count < 1]
    if args.ddp_timeout is not None and args.ddp_timeout < 1:
        errors.append(f"--ddp_timeout {args.ddp_timeout}: give minutes, at least 1")
    if args.full_fp16 and args.full_bf16:
        errors.append("choose one of --full_fp16 and --full_bf16")
    for flag, typed, needed in (("--full_fp16", args.full_fp16, "fp16"), ("--full_bf16", args.full_bf16, "bf16")):
        if typed and mixed_precision != needed:
            errors.append(f"{flag} needs --mixed_precision {needed}, not {mixed_precision}")
    return errors
