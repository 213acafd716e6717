"""What a training run can be told, parsed once by the command line. Paths are as the user gave them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ltx2_tuner.training.balance import BalanceOptions
from ltx2_tuner.training.sigmas import SigmaSampler
from ltx2_tuner.training.supervision import SupervisionOptions

NAN_CHECKS = ("off", "warn", "skip", "error")


@dataclass(frozen=True)
class LossOptions:
    """Element loss and the automatic audio weight."""

    kind: str = "mse"
    huber_delta: float = 1.0
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    supervision: SupervisionOptions = field(default_factory=SupervisionOptions)


@dataclass(frozen=True)
class DrawOptions:
    """The random decisions of training: noise levels, first-frame conditioning, dropped captions."""

    sampler: SigmaSampler = field(default_factory=SigmaSampler)
    first_frame_p: float = 0.1
    caption_dropout_rate: float = 0.0


@dataclass(frozen=True)
class LoopOptions:
    """How long and how to step. max_steps counts optimizer steps; epochs, when given, override it."""

    seed: int
    max_steps: int = 1600
    max_epochs: int | None = None
    accumulation: int = 1
    max_grad_norm: float = 1.0
    scale_weight_norms: float | None = None
    nan_check: str = "skip"


@dataclass(frozen=True)
class SaveOptions:
    """What is written into `output_dir`, when, and what is removed again."""

    output_dir: Path
    output_name: str
    every_steps: int | None = None
    every_epochs: int | None = None
    last_steps: int | None = None
    last_epochs: int | None = None
    state: bool = False
    state_on_train_end: bool = False
    last_steps_state: int | None = None
    last_epochs_state: int | None = None
    precision: str = "fp32"
    comfy: bool = True
    original: bool = True
    sidecar: bool = False


@dataclass(frozen=True)
class ValidationOptions:
    """When the validation loss is measured; None is never."""

    every_steps: int | None = None
    every_epochs: int | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.every_steps or self.every_epochs)


@dataclass(frozen=True)
class SampleOptions:
    """When previews are made; None is never."""

    at_first: bool = False
    every_steps: int | None = None
    every_epochs: int | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.at_first or self.every_steps or self.every_epochs)


@dataclass(frozen=True)
class LogOptions:
    """Where the numbers of a run go. histogram_interval: steps between histograms of noise levels, 0 is never."""

    directory: Path | None = None
    trackers: tuple[str, ...] = ()
    prefix: str = ""
    name: str = "network_train"
    tracker_config: Path | None = None
    wandb_run_name: str | None = None
    histogram_interval: int = 100
