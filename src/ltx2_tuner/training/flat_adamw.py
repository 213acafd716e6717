"""AdamW over thousands of small parameters in a few large kernels.

A LoRA on all attentions has more than two thousand matrices. torch's fused AdamW takes 36 of them a launch, which
fills half of a large GPU. Here parameters and moments lie side by side, and gradients often do already (recorded passes
leave them so): every run of neighbours is stepped as the one flat tensor that it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ltx2_tuner.side_by_side import empty, in_one_memory, joined, runs

Table = tuple[list[Tensor], ...]  # parameters, gradients, exp_avg, exp_avg_sq, step

_WHOLE = 64  # values: a multiple keeps addresses aligned, and fills vector registers (the CPU rounds a rest otherwise)
_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class _Cohort:
    """Parameters that have made the same steps.

    Attributes:
        clocks: addresses of their counts; empty as long as they have no state.
        addresses, runs: of the tensors of the last step. A step takes a millisecond less where they are the same.
    """

    params: list[nn.Parameter]
    clocks: list[int]
    addresses: list[list[int]] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)

    def runs_of(self, table: Table) -> list[tuple[int, int]]:
        """Rows of parameters, gradients, moments and steps that lie side by side."""
        addresses = [list(map(Tensor.data_ptr, column)) for column in table]
        same = addresses == self.addresses
        # Gradients that are new every time may be neighbours by chance, at the same addresses.
        if not (same and all(in_one_memory(column[slice(*run)]) for column in table for run in self.runs)):
            self.addresses, self.runs = addresses, runs(*table)
        return self.runs


@dataclass(eq=False)
class _Roster:
    """The parameters of a group: those in cohorts and the others, which are stepped one by one."""

    params: list[nn.Parameter]
    cohorts: list[_Cohort]
    others: list[nn.Parameter]


class FlatAdamW(torch.optim.AdamW):
    """torch.optim.AdamW to the bit, with its keywords and its state; faster with `fused=True`, else the same.

    A parameter that has its memory to itself is moved beside the others of its group when the group is added; one that
    shares memory was put there by somebody and stays. What lies where is looked up at every step, so that parameters,
    gradients and state may be moved at any time. Strangers are stepped one by one.

    `_init_group`, where torch collects the tensors of a step, is the one place that this changes: closures, hooks,
    schedules and loss scaling are torch's own, and should torch stop calling it, its plain step is left.
    """

    def add_param_group(self, param_group: dict[str, object]) -> None:
        super().add_param_group(param_group)
        self._rosters: dict[int, _Roster] = {}
        group = self.param_groups[-1]
        if group["fused"]:
            free = [p for p in group["params"] if _joinable(p) and _alone(p)]
            times = Counter(p.data_ptr() for p in free)
            for alike in _alike(p for p in free if times[p.data_ptr()] == 1):
                _move(alike)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._rosters = {}
        for group in self.param_groups:
            if self._plain(group):  # now, and not at a step, when memory may be short
                self._roster(group)

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps):
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        if not self._plain(group):
            self._rosters.pop(id(group), None)  # steps are counted without it
            return super()._init_group(group, *lists)
        tables = self._tables(group)
        if tables is None:
            del self._rosters[id(group)]
            tables = self._tables(group)
        counted_here = []
        for table, ranges in tables:
            steps = table[-1]
            for start, stop in ranges:
                for found, column in zip((params, grads, exp_avgs, exp_avg_sqs), table):
                    found.append(column[start] if stop - start == 1 else joined(column[start:stop]))
                state_steps.append(steps[start])  # torch counts this one
                if stop - start > 1:
                    counted_here.append(joined(steps[start + 1 : stop]))
        if counted_here:
            torch._foreach_add_(counted_here, 1)
        return super()._init_group({**group, "params": self._rosters[id(group)].others}, *lists)

    def _plain(self, group: dict[str, object]) -> bool:
        special = group["amsgrad"] or group["capturable"] or group["differentiable"]
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        return bool(group["fused"]) and not (special or scaled or torch.compiler.is_compiling())

    def _tables(self, group: dict[str, object]) -> list[tuple[Table, list[tuple[int, int]]]] | None:
        """The tensors of each cohort that has gradients, with their runs; None where somebody has changed the state."""
        roster = self._roster(group)
        tables, cohorts = [], []
        for cohort in roster.cohorts:
            grads = [p.grad for p in cohort.params]
            stays = [p for p, grad in zip(cohort.params, grads) if grad is None]
            if len(stays) == len(cohort.params):
                cohorts.append(cohort)
                continue
            if stays:  # from now on these are behind
                halves = _divided(cohort)
                cohorts.append(halves[0])
                cohort, grads = halves[1], [grad for grad in grads if grad is not None]
            cohorts.append(cohort)
            if not cohort.clocks:
                if any(map(self.state.get, cohort.params)):
                    return None
                self._lay(cohort, fresh=True)
            states = [self.state[p] for p in cohort.params]
            if not all(states):
                return None
            steps, *moments = ([state[key] for state in states] for key in _STATE)
            table = (cohort.params, grads, *moments, steps)
            ranges = cohort.runs_of(table)
            if cohort.addresses[-1] != cohort.clocks:
                return None
            tables.append((table, ranges))
        roster.cohorts = cohorts
        return tables

    def _roster(self, group: dict[str, object]) -> _Roster:
        """What is known of a group, or what can be read off its state, which is laid side by side then."""
        known, params = self._rosters.get(id(group)), group["params"]
        if known and len(known.params) == len(params) and all(map(operator.is_, known.params, params)):
            return known
        roster = _Roster(list(params), [], [p for p in params if not _joinable(p)])
        for alike in _alike(p for p in params if _joinable(p)):
            new = [p for p in alike if not self.state.get(p)]
            old = [p for p in alike if self.state.get(p)]
            counts = torch.stack([self.state[p]["step"] for p in old]).tolist() if old else []
            for count in sorted(set(counts)):
                cohort = _Cohort([p for p, own in zip(old, counts) if own == count], [])
                self._lay(cohort)
                roster.cohorts.append(cohort)
            if new:
                roster.cohorts.append(_Cohort(new, []))
        self._rosters[id(group)] = roster
        return roster

    @torch.no_grad()
    def _lay(self, cohort: _Cohort, fresh: bool = False) -> None:
        """Put a cohort's state side by side, as zeros if it is fresh."""
        first = cohort.params[0]
        for key in _STATE:
            shapes = [() if key == "step" else p.shape for p in cohort.params]
            places = empty(shapes, torch.float32 if key == "step" else first.dtype, first.device)
            if fresh:
                joined(places).zero_()
            else:
                torch._foreach_copy_(places, [self.state[p][key] for p in cohort.params])
            for parameter, place in zip(cohort.params, places):
                self.state[parameter][key] = place
        cohort.clocks = [self.state[p]["step"].data_ptr() for p in cohort.params]


def _divided(cohort: _Cohort) -> tuple[_Cohort, _Cohort]:
    """Those without a gradient and those with one."""
    halves = (_Cohort([], []), _Cohort([], []))
    for parameter, clock in zip(cohort.params, cohort.clocks or [None] * len(cohort.params)):
        half = halves[parameter.grad is not None]
        half.params.append(parameter)
        if clock is not None:
            half.clocks.append(clock)
    return halves


def _joinable(parameter: Tensor) -> bool:
    """Whether it may be stepped as a part of something larger."""
    return (
        type(parameter) is nn.Parameter
        and parameter.is_leaf
        and parameter.is_floating_point()
        and parameter.device.type in ("cuda", "cpu")
        and parameter.is_contiguous()
        and parameter.numel() > 0
        and parameter.numel() % _WHOLE == 0
    )


def _alone(parameter: Tensor) -> bool:
    return parameter.untyped_storage().nbytes() == parameter.nbytes


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those of one dtype and device together."""
    found: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return list(found.values())


@torch.no_grad()
def _move(parameters: Sequence[nn.Parameter]) -> None:
    """Put parameters side by side; they stay the objects they are."""
    places = empty([p.shape for p in parameters], parameters[0].dtype, parameters[0].device)
    torch._foreach_copy_(places, list(parameters))
    for parameter, place in zip(parameters, places):
        parameter.data = place
