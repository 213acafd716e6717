"""Fits a saved state to optimizer groups that come and go with the regularizers: groups are known by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")  # lists of a scheduler's state


def fit_optimizer(saved: dict, mine: dict, saved_names: Sequence[str], names: Sequence[str]) -> dict:
    """A saved optimizer state for the groups of this run; groups that it lacks start fresh, surplus ones are left out.

    Args:
        saved, mine: `state_dict()` of the saved and of this run's optimizer.
        saved_names, names: their groups.
    """
    if list(saved_names) == list(names):
        return saved
    places = dict(zip(_unique(saved_names), saved["param_groups"]))
    groups, state = [], {}
    for name, group in zip(_unique(names), mine["param_groups"]):
        source = places.get(name, group)
        groups.append({**source, "params": group["params"]})
        if name in places:
            pairs = zip(source["params"], group["params"])
            state |= {new: saved["state"][old] for old, new in pairs if old in saved["state"]}
    return {**saved, "state": state, "param_groups": groups}


def fit_scheduler(saved: dict, mine: dict, saved_names: Sequence[str], names: Sequence[str]) -> dict:
    """The same for a scheduler: its lists with one entry per group."""
    if list(saved_names) == list(names):
        return saved
    fitted = dict(saved)
    for key in _PER_GROUP:
        if key in saved and key in mine:
            known = dict(zip(_unique(saved_names), saved[key]))
            fitted[key] = [known.get(name, own) for name, own in zip(_unique(names), mine[key])]
    return fitted


def _unique(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with the number of equal ones before it."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        unique.append((name, seen[name]))
        seen[name] += 1
    return unique
