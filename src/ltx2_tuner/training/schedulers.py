"""Learning-rate schedules (06 section 7.3): a factor on each group's own rate, by optimizer steps done.

A scheduler is stepped once per optimizer step, never per micro-batch or per process, so that a run on several
processes follows the same curve.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.errors import UserError, did_you_mean
from ltx2_tuner.training.literals import keywords_of, literals

# Name -> keys of --lr_scheduler_args it takes.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": (),
    "cosine_with_restarts": (),
    "polynomial": (),
    "inverse_sqrt": (),
    "cosine_with_min_lr": (),
    "warmup_stable_decay": (),
    "piecewise_constant": ("step_rules",),
    "rex": ("rex_alpha", "rex_beta"),
    "adafactor": (),
}
Span = int | float
Factor = Callable[[int], float]


@dataclass(frozen=True)
class SchedulerOptions:
    """The schedule.

    Attributes:
        name: a key of SCHEDULERS.
        warmup, decay: steps as an int, or a share of all steps as a float below 1.
        cycles, power, timescale, min_lr_ratio: what the schedules that read them take.
        custom_class: `package.module.Class` in place of `name`.
        args: `--lr_scheduler_args`, key -> text.
    """

    name: str = "constant"
    warmup: Span = 0
    decay: Span = 0
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None
    custom_class: str | None = None
    args: Mapping[str, str] = field(default_factory=dict)


def parse_span(text: str) -> Span:
    """`100` steps, or `0.1` and `10%` of all steps.

    Raises:
        ValueError: neither.
    """
    if text.endswith("%"):
        share = float(text[:-1]) / 100
    elif text.lstrip("+-").isdigit():
        share = int(text)
    else:
        share = float(text)
    if not share >= 0 or (isinstance(share, float) and share >= 1):  # `not >=` refuses nan too
        raise ValueError(text)
    return share


def span_steps(span: Span, total_steps: int) -> int:
    """A span in optimizer steps."""
    return math.floor(span * total_steps + 1e-9) if isinstance(span, float) else span  # 29% of 100 is 29


def check_scheduler(options: SchedulerOptions, total_steps: int | None = None) -> list[str]:
    """One sentence per mistake in the options; `total_steps` None leaves out what depends on the run's length."""
    errors = []
    if options.custom_class is not None:
        return _custom_errors(options)
    if options.name not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        hint = did_you_mean(options.name, SCHEDULERS)
        return [f"--lr_scheduler {options.name}: no such schedule{hint}; use one of {known}"]
    allowed = SCHEDULERS[options.name]
    for key in options.args:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            errors.append(f"--lr_scheduler_args {key}: {options.name} does not take it; it takes {known}")
    if options.name == "constant" and options.warmup:
        errors.append("--lr_warmup_steps: constant has no warm-up; use --lr_scheduler constant_with_warmup")
    if options.name == "cosine_with_min_lr" and options.min_lr_ratio is None:
        errors.append("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, such as 0.1")
    if options.name == "warmup_stable_decay" and not options.decay:
        errors.append("--lr_scheduler warmup_stable_decay needs --lr_decay_steps, such as 10%")
    if options.name == "piecewise_constant":
        errors += _try_parse(options.args)
    if options.min_lr_ratio is not None and not 0 <= options.min_lr_ratio <= 1:
        errors.append(f"--lr_scheduler_min_lr_ratio {options.min_lr_ratio}: give a ratio from 0 to 1")
    if options.power < 0:
        errors.append(f"--lr_scheduler_power {options.power:g}: give a number of at least 0")
    counts = {"num_cycles": options.cycles, "timescale": options.timescale}
    errors += [f"--lr_scheduler_{name} {n}: give at least 1" for name, n in counts.items() if n is not None and n < 1]
    if total_steps is not None:
        errors += _length_errors(options, total_steps)
    return errors


def scheduler_notes(options: SchedulerOptions) -> list[str]:
    """A sentence about settings that the schedule does not read, where there are any."""
    plain = SchedulerOptions()
    readers = {
        "lr_decay_steps": ("decay", ("warmup_stable_decay",)),
        "lr_scheduler_num_cycles": ("cycles", ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")),
        "lr_scheduler_power": ("power", ("polynomial",)),
        "lr_scheduler_timescale": ("timescale", ("inverse_sqrt",)),
        "lr_scheduler_min_lr_ratio": ("min_lr_ratio", ("cosine_with_min_lr", "warmup_stable_decay", "rex")),
    }
    name = options.name
    if options.custom_class is not None:
        name = f"{options.custom_class} (--lr_scheduler_type)"
        readers["lr_warmup_steps"] = ("warmup", ())
    unread = [
        f"--{flag}"
        for flag, (field_name, names) in readers.items()
        if getattr(options, field_name) != getattr(plain, field_name) and name not in names
    ]
    if options.custom_class is not None and options.name != plain.name:
        unread.insert(0, f"--lr_scheduler {options.name}")
    return [f"{name} does not read {', '.join(unread)}"] if unread else []


def create_scheduler(
    optimizer: Optimizer, options: SchedulerOptions, total_steps: int, learning_rate: float
) -> LRScheduler | FixedRates:
    """The scheduler to step after each optimizer step.

    Args:
        total_steps: optimizer steps of the whole run.
        learning_rate: `--learning_rate`; polynomial ends at 1e-7 on it, Adafactor's own schedule reports it.

    Raises:
        UserError: `check_scheduler` has something to say, or the custom class cannot be made.
    """
    errors = check_scheduler(options, total_steps)
    if errors:
        raise UserError("; ".join(errors))
    if is_schedule_free(optimizer):
        return FixedRates(optimizer)
    if options.custom_class is not None:
        return _custom(optimizer, options)
    if options.name == "adafactor" or optimizer.defaults.get("relative_step"):
        if not optimizer.defaults.get("relative_step"):
            raise UserError("--lr_scheduler adafactor goes with --optimizer_type Adafactor and relative_step=True only")
        prepare_torchaudio()
        from transformers.optimization import AdafactorSchedule

        return AdafactorSchedule(optimizer, learning_rate)
    return LambdaLR(optimizer, lr_factor(options, total_steps, learning_rate))


def lr_factor(options: SchedulerOptions, total_steps: int, learning_rate: float = 1.0) -> Factor:
    """The factor after i optimizer steps."""
    warmup = span_steps(options.warmup, total_steps)
    after = _after_warmup(options, total_steps, warmup, learning_rate)
    start = _rex_floor(options) if options.name == "rex" else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1.0 - start) * step / warmup
        return after(step)

    return factor


class FixedRates:
    """Stands for a scheduler where the optimizer schedules itself: it reports rates and changes none."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Nothing to change."""

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Nothing to restore."""


def is_schedule_free(optimizer: Optimizer) -> bool:
    """True when the class name ends in `schedulefree`, in any case."""
    return type(optimizer).__name__.lower().endswith("schedulefree")


def _after_warmup(options: SchedulerOptions, total: int, warmup: int, learning_rate: float) -> Factor:
    floor = options.min_lr_ratio or 0.0

    def progress(step: int) -> float:
        return min((step - warmup) / max(1, total - warmup), 1.0)

    def cosine(share: float, low: float = 0.0) -> float:
        return low + (1.0 - low) * (1.0 + math.cos(math.pi * options.cycles * share)) / 2.0

    def restarts(step: int) -> float:
        share = progress(step)
        return 0.0 if share >= 1.0 else (1.0 + math.cos(math.pi * ((options.cycles * share) % 1.0))) / 2.0

    def polynomial(step: int) -> float:
        end = min(1e-7 / learning_rate, 1.0)
        return end + (1.0 - end) * (1.0 - progress(step)) ** options.power

    def inverse_sqrt(step: int) -> float:
        scale = options.timescale or warmup or 10_000
        return math.sqrt(scale / (step + scale - warmup))

    def stable_decay(step: int) -> float:
        decay = span_steps(options.decay, total)
        share = (step - (total - decay)) / max(1, decay)
        return 1.0 if share < 0 else cosine(min(share, 1.0), floor)

    def rex(step: int) -> float:
        low, rest = _rex_floor(options), 1.0 - progress(step)
        alpha, beta = float(options.args.get("rex_alpha", 0.1)), float(options.args.get("rex_beta", 0.9))
        return low + (1.0 - low) * rest / (alpha + beta * rest)

    curves: dict[str, Factor] = {
        "linear": lambda step: 1.0 - progress(step),
        "cosine": lambda step: (1.0 + math.cos(math.pi * progress(step))) / 2.0,
        "cosine_with_restarts": restarts,
        "polynomial": polynomial,
        "inverse_sqrt": inverse_sqrt,
        "cosine_with_min_lr": lambda step: cosine(progress(step), floor),
        "warmup_stable_decay": stable_decay,
        "rex": rex,
    }
    if options.name == "piecewise_constant":
        rules, last = parse_step_rules(options.args["step_rules"])
        return lambda step: next((value for until, value in rules if step < until), last)
    return curves.get(options.name, lambda step: 1.0)


def parse_step_rules(text: str) -> tuple[list[tuple[int, float]], float]:
    """`1:10,0.1:20,0.01`: factor 1 for steps below 10, 0.1 below 20, 0.01 after.

    Raises:
        ValueError: another form, or steps that do not grow.
    """
    *parts, last = text.split(",")
    rules = [(int(part.split(":")[1]), float(part.split(":")[0])) for part in parts if part.count(":") == 1]
    ends = [until for until, _ in rules]
    if len(rules) != len(parts) or ends != sorted(set(ends)):
        raise ValueError(text)
    return rules, float(last)


def _rex_floor(options: SchedulerOptions) -> float:
    return 0.01 if options.min_lr_ratio is None else options.min_lr_ratio


def _try_parse(args: Mapping[str, str]) -> list[str]:
    try:
        parse_step_rules(args.get("step_rules", ""))
    except ValueError:
        found = args.get("step_rules")
        return [f"--lr_scheduler_args step_rules={found}: piecewise_constant needs it in the form 1:10,0.1:20,0.01"]
    return []


def _length_errors(options: SchedulerOptions, total: int) -> list[str]:
    warmup = span_steps(options.warmup, total)
    if warmup > total:
        return [f"--lr_warmup_steps {warmup} is more than the run's {total} optimizer steps; lower it"]
    decay = span_steps(options.decay, total)
    if options.name == "warmup_stable_decay" and warmup + decay > total:
        return [f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} are more than the run's {total} steps"]
    return []


def _custom(optimizer: Optimizer, options: SchedulerOptions) -> LRScheduler:
    found = load_class(options.custom_class, "--lr_scheduler_type")
    known = keywords_of(found)
    for key in options.args:
        if known is not None and key not in known:
            hint = did_you_mean(key, known)
            listed = ", ".join(k for k in known if k != "optimizer")
            raise UserError(f"--lr_scheduler_args {key}: {found.__name__} does not take it{hint}; it takes {listed}")
    try:
        return found(optimizer, **literals(options.args))
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr_scheduler_type {options.custom_class}: {error}; correct --lr_scheduler_args") from error


def load_class(path: str, flag: str) -> type:
    """The class `package.module.Class`.

    Raises:
        UserError: no such module or class.
    """
    module, _, name = path.rpartition(".")
    if module.startswith("transformers"):
        prepare_torchaudio()
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise UserError(f"{flag} {path}: no module {error.name}; install it (pip install {package})") from error
    except (AttributeError, ValueError) as error:
        raise UserError(f"{flag} {path}: {module or path} has no class {name}; check the spelling") from error


def _custom_errors(options: SchedulerOptions) -> list[str]:
    """What is wrong with a class, found by making one for an optimizer of nothing much."""
    path = options.custom_class
    if "." not in path:
        return [f"--lr_scheduler_type {path}: give a class with its package, such as torch.optim.lr_scheduler.StepLR"]
    try:
        _custom(SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), options)
    except UserError as error:
        return [str(error)]
    return []
