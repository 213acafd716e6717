"""What a training run is made of: the objects that the loop is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ltx2_tuner.training.balance import AudioBalancer
from ltx2_tuner.training.guard import NonFiniteGuard
from ltx2_tuner.training.modes import Mode
from ltx2_tuner.training.options import DrawOptions, LoopOptions, LossOptions, SampleOptions, ValidationOptions
from ltx2_tuner.training.regularizers import Regularizers
from ltx2_tuner.training.saver import RunSaver
from ltx2_tuner.training.supervision import AudioMonitor
from ltx2_tuner.training.validation import Validator
from ltx2_tuner.training.window import Gradients


class BatchSource(Protocol):
    """Epochs of batches, the same for the same seed (data.batches.EpochLoader)."""

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, from 1, and how many of its batches are left out, unread, at the start."""

    def start(self) -> None:
        """Begin to load the chosen batches, for the next pass over them."""

    def __len__(self) -> int:
        """Batches in an epoch, whatever is skipped."""

    def __iter__(self) -> Iterator[dict]: ...


class Sampler(Protocol):
    """Makes previews (sampling.preview.Previewer)."""

    def sample(
        self,
        transformer: nn.Module,
        *,
        step: int,
        epoch: int | None,
        label: str,
        on_sample: Callable[[int, Sequence[Path], object], None],
    ) -> object: ...


@dataclass
class Run:
    """Everything a training run is made of. Regularizers and previews plug in here.

    before_samples: called before previews are made.
    """

    device: torch.device
    rank: int
    autocast: Callable[[], contextlib.AbstractContextManager]
    model: nn.Module
    network: nn.Module
    mode: Mode
    data: BatchSource
    optimizer: torch.optim.Optimizer
    scheduler: object
    gradients: Gradients
    group_names: Sequence[str]
    loop: LoopOptions
    draws: DrawOptions
    loss: LossOptions
    balancer: AudioBalancer
    monitor: AudioMonitor | None
    guard: NonFiniteGuard
    saver: RunSaver
    log: Callable[[dict[str, float], int], None]
    histogram: Callable[[str, Sequence[float], int], None]
    show_sample: Callable[..., None]  # (index, paths, step, label="")
    histogram_interval: int
    validation: ValidationOptions
    validator: Validator | None
    samples: SampleOptions
    sampler: Sampler | None
    swapped: int = 0  # blocks streamed from the host
    scaler: torch.amp.GradScaler | None = None
    regularizers: Regularizers = field(default_factory=Regularizers)
    before_samples: Callable[[], None] = lambda: None
