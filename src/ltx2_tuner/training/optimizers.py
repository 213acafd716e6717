"""Optimizers by name or class path (06 section 7.2)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from ltx2_tuner.errors import UserError, did_you_mean
from ltx2_tuner.training.literals import keywords_of, literals
from ltx2_tuner.training.schedulers import load_class

logger = logging.getLogger(__name__)

# Short name -> class, and the package to install where that is not obvious from the module.
SHORT_NAMES = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "Adam8bit": "bitsandbytes.optim.Adam8bit",
    "PagedAdam8bit": "bitsandbytes.optim.PagedAdam8bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "Adafactor": "transformers.optimization.Adafactor",
    "Lion": "lion_pytorch.Lion",
    "Prodigy": "prodigyopt.Prodigy",
    "CAME": "came_pytorch.CAME",
    "Muon": "torch.optim.Muon",
}
_PIP_NAMES = {
    "lion_pytorch": "lion-pytorch",
    "came_pytorch": "came-pytorch",
    "prodigyplus": "prodigy-plus-schedule-free",
}
DEFAULT_LEARNING_RATE = 2e-6


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates.

    Attributes:
        type: a key of SHORT_NAMES in any case, a class of torch.optim, or `package.module.Class`.
        args: `--optimizer_args`, key -> text.
        learning_rate: of adapters that nothing else names.
        audio_learning_rate: of modules whose name contains `audio_`; None for `learning_rate`.
        lr_args: (pattern, rate) pairs.
        max_grad_norm: global norm that gradients are clipped to, 0 for no clipping.
    """

    type: str = "AdamW"
    args: Mapping[str, str] = field(default_factory=dict)
    learning_rate: float = DEFAULT_LEARNING_RATE
    audio_learning_rate: float | None = None
    lr_args: tuple[tuple[str, float], ...] = ()
    max_grad_norm: float = 1.0


def optimizer_path(name: str) -> str:
    """The class path of `--optimizer_type`; a name without a dot is looked up in any case.

    Raises:
        UserError: torch.optim has no such class.
    """
    if "." in name:
        return name
    known = {short.lower(): path for short, path in SHORT_NAMES.items()}
    found = known.get(name.lower())
    if found:
        return found
    classes = {key.lower(): key for key, value in vars(torch.optim).items() if isinstance(value, type)}
    if name.lower() not in classes:
        hint = did_you_mean(name.lower(), [*known, *classes])
        listed = ", ".join(SHORT_NAMES)
        raise UserError(f"--optimizer_type {name}: no such optimizer{hint}; use one of {listed} or a class path")
    return f"torch.optim.{classes[name.lower()]}"


def create_optimizer(options: OptimizerOptions, groups: Sequence[Mapping[str, object]]) -> Optimizer:
    """The optimizer over parameter groups (`params`, `lr`).

    Raises:
        UserError: unknown name, missing package, or keywords that the class does not take.
    """
    if not groups:
        raise UserError("nothing to train: every learning rate is 0; raise --learning_rate, --audio_lr or --lr_args")
    path = optimizer_path(options.type)
    found = _load(path, options.type)
    keywords = literals(options.args)
    _check_keywords(found, keywords)
    groups = [dict(group) for group in groups]
    learning_rate: float | None = options.learning_rate
    if path == SHORT_NAMES["Adafactor"]:
        learning_rate = _prepare_adafactor(options, keywords, groups)
    elif path == SHORT_NAMES["AdamW"] and _all_on_cuda(groups) and not {"fused", "foreach"} & keywords.keys():
        keywords["fused"] = True
    elif found.__name__.lower().startswith("prodigy") and options.learning_rate < 0.1:
        logger.warning("Prodigy expects lr 1.0; --learning_rate is %g", options.learning_rate)
    if learning_rate is not None:
        keywords.setdefault("lr", learning_rate)
    return _construct(found, groups, keywords, options.type)


def _construct(found: type[Optimizer], groups: list, keywords: Mapping[str, object], typed: str) -> Optimizer:
    try:
        return found(groups, **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--optimizer_type {typed}: {error}; correct --optimizer_args") from error


def drops_by_itself(optimizer: Optimizer) -> bool:
    """Whether the device can be told to drop a step: torch's fused Adams look at a flag there, for GradScaler.

    (SGD takes the flag, too, but a first step that is dropped leaves its momentum undefined.)
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)  # a resumed state has brought its own
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and fused


def step_unless(bad: torch.Tensor, optimizer: Optimizer) -> None:
    """A step that changes nothing where `bad`, a float32 scalar on the device, is 1. See `drops_by_itself`."""
    optimizer.found_inf = bad
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def describe_optimizer(optimizer: Optimizer, options: OptimizerOptions) -> str:
    """`torch.optim.adamw.AdamW` or `torch.optim.adamw.AdamW(weight_decay=0.1)`, for the saved metadata."""
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    listed = ",".join(f"{key}={value}" for key, value in options.args.items())
    return f"{name}({listed})" if listed else name


def scheduler_warnings(optimizer: Optimizer, scheduler: str, max_grad_norm: float) -> list[str]:
    """What to tell about Adafactor together with this schedule and clipping (06 section 7.2)."""
    if type(optimizer).__name__ != "Adafactor" or "relative_step" not in optimizer.defaults:
        return []
    if optimizer.defaults["relative_step"]:
        if scheduler in ("adafactor", "constant"):
            return []
        return [f"Adafactor with relative_step=True schedules itself; --lr_scheduler {scheduler} has no effect"]
    warnings = []
    if max_grad_norm:
        warnings.append("Adafactor clips by itself; --max_grad_norm 0 is recommended with relative_step=False")
    if scheduler != "constant_with_warmup":
        warnings.append("--lr_scheduler constant_with_warmup is recommended for Adafactor with relative_step=False")
    return warnings


def _load(path: str, typed: str) -> type[Optimizer]:
    module = path.rpartition(".")[0].split(".")[0]
    try:
        found = load_class(path, "--optimizer_type")
    except UserError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == module:
            package = _PIP_NAMES.get(module, module)
            raise UserError(f"--optimizer_type {typed} needs a package: pip install {package}") from error
        if path == SHORT_NAMES["Muon"]:
            raise UserError("--optimizer_type Muon needs torch 2.9 or newer; upgrade torch") from error
        raise
    if not isinstance(found, type) or not hasattr(found, "step"):
        raise UserError(f"--optimizer_type {typed}: {path} is no optimizer class; check the spelling")
    return found


def _check_keywords(found: type, keywords: Mapping[str, object]) -> None:
    known = keywords_of(found)
    if known is None:
        return
    allowed = [name for name in known if name != "params"]
    for key in keywords:
        if key not in allowed:
            raise UserError(
                f"--optimizer_args {key}: {found.__name__} does not take it{did_you_mean(key, allowed)}; "
                f"it takes {', '.join(allowed)}"
            )


def _prepare_adafactor(
    options: OptimizerOptions, keywords: dict[str, object], groups: list[dict[str, object]]
) -> float | None:
    """Settle relative_step in `keywords`; None when Adafactor finds the rate itself."""
    if keywords.get("warmup_init"):
        if keywords.get("relative_step") is False:
            logger.warning("Adafactor: warmup_init=True needs relative_step=True, which is set now")
        keywords["relative_step"] = True
    if not keywords.setdefault("relative_step", True):
        return options.learning_rate
    if len({group.get("lr") for group in groups}) > 1:
        logger.warning("Adafactor with relative_step=True finds one rate itself; --audio_lr and --lr_args do nothing")
    for group in groups:
        group.pop("lr", None)
    return None


def _all_on_cuda(groups: Sequence[Mapping[str, object]]) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def check_optimizer(options: OptimizerOptions) -> list[str]:
    """One sentence per mistake that shows without building anything."""
    errors = []
    try:
        found, keywords = _load(optimizer_path(options.type), options.type), literals(options.args)
        _check_keywords(found, keywords)
        if options.args:  # their values, on a parameter of every optimizer's liking
            _construct(found, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 1e-3}], keywords, options.type)
    except UserError as error:
        errors.append(str(error))
    rates = {"--learning_rate": options.learning_rate, "--audio_lr": options.audio_learning_rate}
    for flag, rate in rates.items():
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            errors.append(f"{flag} {rate}: give a number of at least 0")
    if not (math.isfinite(options.max_grad_norm) and options.max_grad_norm >= 0):
        errors.append(f"--max_grad_norm {options.max_grad_norm}: give a number of at least 0 (0 = no clipping)")
    return errors
