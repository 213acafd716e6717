"""Averages of the checkpoints of one run, made after it (post-hoc exponential moving average)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ltx2_tuner.errors import UserError


def betas(count: int, beta: float = 0.95, beta2: float | None = None, sigma_rel: float | None = None) -> list[float]:
    """Share of the average that is kept when each of the files after the first is added.

    Args:
        count: number of files.
        beta, beta2: constant, or linear from `beta` to `beta2`.
        sigma_rel: width of the average relative to the run (power-function profile), in place of both.

    Raises:
        UserError: no such profile.
    """
    steps = count - 1
    if sigma_rel is not None:
        gamma = power_of(sigma_rel)
        return [(1 - 1 / (index + 1)) ** (gamma + 1) for index in range(steps)]
    if beta2 is None or steps < 2:
        return [beta] * steps
    return [beta + (beta2 - beta) * index / (steps - 1) for index in range(steps)]


def power_of(sigma_rel: float) -> float:
    """The exponent of the power-function profile of a relative width.

    Raises:
        UserError: the width is not between 0 and 0.28.
    """
    inverse = sigma_rel**-2 if sigma_rel > 0 else 0.0
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    real = [root.real for root in roots if abs(root.imag) < 1e-9 and root.real >= 0]
    if not real:
        raise UserError(f"--sigma_rel {sigma_rel:g}: give a width above 0 and at most 0.28")
    return float(max(real))


def average(
    sources: Sequence[str], read: Callable[[str], Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, Tensor]:
    """The average of LoRA files of one run in float32, returned in the dtypes of the first.

    Args:
        sources: file names in the order of training, one at a time in memory.
        read: gives a file's tensors.
        shares: of `betas`, one less than the files.

    Raises:
        UserError: files of other layers, ranks or alphas.
    """
    first = read(sources[0])
    mean = {name: tensor.float() for name, tensor in first.items()}
    for source, kept in zip(sources[1:], shares):
        tensors = read(source)
        _check_alike(first, tensors, sources[0], source)
        for name, tensor in tensors.items():
            if not name.endswith(".alpha"):
                mean[name].lerp_(tensor.float(), 1 - kept)
    return {name: mean[name].to(tensor.dtype) for name, tensor in first.items()}


def _check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str, other_name: str) -> None:
    unequal = first.keys() ^ other.keys()
    if unequal:
        raise UserError(
            f"{name} and {other_name} differ in {len(unequal)} tensors ({min(unequal)}); give files of one run"
        )
    for key, tensor in first.items():
        if tensor.shape != other[key].shape:
            raise UserError(
                f"{key} is {list(tensor.shape)} in {name} and {list(other[key].shape)} in {other_name}; "
                "give files of one run"
            )
        if key.endswith(".alpha") and not torch.equal(tensor, other[key].to(tensor.dtype)):
            raise UserError(f"{key} differs between {name} and {other_name}; give files of one run")
