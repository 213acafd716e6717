"""Puts a saved optimizer and schedule back where this run may have other groups or rates.

Moments are known by the parameter's name and settings by the group's, so that groups may come and go (--audio_lr,
loraplus_lr_ratio, a regularizer's projector). What is new starts fresh, what is gone is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer


def parameter_names(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> list[list[str]]:
    """The names of each group's parameters."""
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def load_optimizer(
    optimizer: Optimizer,
    saved: dict,
    saved_parameters: Sequence[Sequence[str]],
    parameters: Sequence[Sequence[str]],
    saved_names: Sequence[str],
    names: Sequence[str],
) -> None:
    """Load a saved state, at the learning rates of this run.

    Args:
        saved: `state_dict()` of the saved optimizer.
        saved_parameters, parameters: names of the parameters of each of its and of this run's groups.
        saved_names, names: of the groups.
    """
    mine = optimizer.state_dict()
    numbers = {
        name: number
        for group, members in zip(saved["param_groups"], saved_parameters)
        for name, number in zip(members, group["params"])
    }
    places = dict(zip(_unique(saved_names), saved["param_groups"]))
    groups, state = [], {}
    for name, members, group in zip(_unique(names), parameters, mine["param_groups"]):
        source = places.get(name, group)
        groups.append({**source, **_rates(source, group), "params": group["params"]})
        for member, number in zip(members, group["params"]):
            old = numbers.get(member)
            if old in saved["state"]:
                state[number] = saved["state"][old]
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    _keep_dtypes(optimizer, groups, state)


def load_scheduler(scheduler: object, saved: dict, optimizer: Optimizer) -> None:
    """Load a saved schedule: its place stays, its rates are those of this run's groups."""
    mine = scheduler.state_dict()
    fitted = dict(saved)
    for key in ("base_lrs", "lr_lambdas"):
        if key in mine:
            fitted[key] = mine[key]
    if "_last_lr" in saved:
        fitted["_last_lr"] = [group["lr"] for group in optimizer.param_groups]
    scheduler.load_state_dict(fitted)


def _rates(saved: Mapping, mine: Mapping) -> dict[str, object]:
    """The rates of a group: this run's, as far along the schedule as the saved one's."""
    base = mine.get("initial_lr")
    if base is None or not saved.get("initial_lr"):
        return {"lr": mine["lr"]}
    return {"lr": saved["lr"] * (base / saved["initial_lr"]), "initial_lr": base}


def _keep_dtypes(optimizer: Optimizer, groups: Sequence[Mapping], state: Mapping[int, Mapping]) -> None:
    """torch casts what it loads to the parameter's dtype; some optimizers keep theirs in another on purpose."""
    for group, described in zip(optimizer.param_groups, groups):
        for parameter, number in zip(group["params"], described["params"]):
            for key, value in state.get(number, {}).items():
                now = optimizer.state[parameter].get(key)
                if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != value.dtype:
                    optimizer.state[parameter][key] = value.to(now.device)


def _unique(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with the number of equal ones before it."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        unique.append((name, seen[name]))
        seen[name] += 1
    return unique
