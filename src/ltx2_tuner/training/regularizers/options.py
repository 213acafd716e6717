"""What the regularizers can be told. Field names are the keys of the `--..._args` lists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

SCHEDULES = ("constant", "linear", "cosine")
DINO_WIDTHS = {"dinov2_vits14": 384, "dinov2_vitb14": 768, "dinov2_vitl14": 1024, "dinov2_vitg14": 1536}


def one_of(default: str, *others: str):
    """A field whose value is one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class PreservationOptions:
    """Strength of each technique; None where it is off. dop_class: the class prompt, which may be empty."""

    blank: float | None = None
    dop: float | None = None
    dop_class: str = ""
    prior_divergence: float | None = None
    audio_dop: float | None = None

    @property
    def needs_prompts(self) -> bool:
        """Whether a prompt has to be known to the run."""
        return self.blank is not None or self.dop is not None

    @property
    def active(self) -> bool:
        """Whether one is on: each has a backward pass of its own."""
        return any(value is not None for value in (self.blank, self.dop, self.prior_divergence, self.audio_dop))


@dataclass(frozen=True)
class CrepaOptions:
    """Frames of a shallow block are drawn to neighbouring frames of a deeper block, or of DINOv2.

    tau: decay of the weight of a neighbour, in frames. num_neighbors: frames on each side. Steps are optimizer steps;
    max_steps 0 is the length of the run.
    """

    mode: str = one_of("backbone", "dino")
    dino_model: str = field(default="dinov2_vitb14", metadata={"choices": tuple(DINO_WIDTHS)})
    student_block_idx: int = 16
    teacher_block_idx: int = 32
    lambda_crepa: float = 0.1
    tau: float = 1.0
    num_neighbors: int = 2
    schedule: str = one_of(*SCHEDULES)
    warmup_steps: int = 0
    max_steps: int = 0
    normalize: bool = True

    def problems(self) -> list[str]:
        """What is out of range, as `key=value ...` sentences."""
        found = at_least(self, 0, "lambda_crepa", "num_neighbors", "warmup_steps", "max_steps", "student_block_idx")
        found += above_zero(self, "tau")
        if self.mode == "backbone" and self.teacher_block_idx <= self.student_block_idx:
            found.append(
                f"teacher_block_idx={self.teacher_block_idx}: teacher_block_idx must be deeper than student_block_idx "
                f"({self.student_block_idx})"
            )
        return found

    @property
    def last_block(self) -> int:
        """The deepest block that is read."""
        return self.teacher_block_idx if self.mode == "backbone" else self.student_block_idx


@dataclass(frozen=True)
class SelfFlowOptions:
    """Features of a shallow block are drawn to those of a deeper one that sees a cleaner view of the clip.

    Ratios are shares of the model's depth and win over the indices. Steps are optimizer steps; temporal_max_steps 0 is
    no decay. projector_lr None is the run's learning rate. max_loss 0 is no cap.
    """

    teacher_mode: str = one_of("base", "ema", "partial_ema")
    student_block_idx: int = 16
    teacher_block_idx: int = 32
    student_block_ratio: float | None = None
    teacher_block_ratio: float | None = None
    student_block_stochastic_range: int = 0
    lambda_self_flow: float = 0.1
    mask_ratio: float = 0.1
    frame_level_mask: bool = False
    mask_focus_loss: bool = False
    max_loss: float = 0.0
    temporal_mode: str = one_of("off", "frame", "delta", "hybrid")
    lambda_temporal: float = 0.0
    lambda_delta: float = 0.0
    temporal_tau: float = 1.0
    num_neighbors: int = 2
    temporal_granularity: str = one_of("frame", "patch")
    patch_spatial_radius: int = 0
    patch_match_mode: str = one_of("hard", "soft")
    patch_match_temperature: float = 0.1
    delta_num_steps: int = 1
    motion_weighting: str = one_of("none", "teacher_delta")
    motion_weight_strength: float = 0.0
    temporal_schedule: str = one_of(*SCHEDULES)
    temporal_warmup_steps: int = 0
    temporal_max_steps: int = 0
    teacher_momentum: float = 0.999
    teacher_update_interval: int = 1
    projector_hidden_multiplier: int = 1
    projector_lr: float | None = None
    loss_type: str = one_of("negative_cosine", "one_minus_cosine")
    dual_timestep: bool = True
    tokenwise_timestep: bool = True
    offload_teacher_features: bool = False
    offload_teacher_params: bool = False

    @property
    def has_frame_term(self) -> bool:
        return self.temporal_mode in ("frame", "hybrid")

    @property
    def has_delta_term(self) -> bool:
        return self.temporal_mode in ("delta", "hybrid")

    @property
    def is_off(self) -> bool:
        """True when no term has a weight, so that no teacher is needed."""
        return not (self.lambda_self_flow or self.lambda_temporal or self.lambda_delta)

    def blocks(self, depth: int) -> tuple[int, int]:
        """Student and teacher block of a model with `depth` blocks."""
        student, teacher = self.student_block_idx, self.teacher_block_idx
        # The products are rounded first: 0.7 of 10 blocks is 7.000000000000001 in binary.
        if self.student_block_ratio is not None:
            student = min(math.floor(round(self.student_block_ratio * depth, 9)), depth - 1)
        if self.teacher_block_ratio is not None:
            teacher = min(math.ceil(round(self.teacher_block_ratio * depth, 9)), depth - 1)
        return student, teacher

    def problems(self) -> list[str]:
        """What is out of range, as `key=value ...` sentences."""
        found = at_least(self, 1, "teacher_update_interval", "projector_hidden_multiplier", "delta_num_steps")
        found += at_least(self, 0, "lambda_self_flow", "lambda_temporal", "lambda_delta", "max_loss", "num_neighbors")
        found += at_least(self, 0, "patch_spatial_radius", "motion_weight_strength", "student_block_stochastic_range")
        found += at_least(self, 0, "temporal_warmup_steps", "temporal_max_steps", "student_block_idx")
        found += above_zero(self, "temporal_tau", "patch_match_temperature")
        if self.projector_lr is not None:
            found += above_zero(self, "projector_lr")
        if not 0 <= self.mask_ratio <= 0.5:
            found.append(f"mask_ratio={self.mask_ratio:g}: must lie between 0 and 0.5")
        if not 0 <= self.teacher_momentum < 1:
            found.append(f"teacher_momentum={self.teacher_momentum:g}: must be at least 0 and below 1")
        for name in ("student_block_ratio", "teacher_block_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio < 1:
                found.append(f"{name}={ratio:g}: must be above 0 and below 1")
        return found or self._conflicts()

    def _conflicts(self) -> list[str]:
        """What does not go together, once every value is in range."""
        found = []
        if self.mask_focus_loss and self.mask_ratio == 0:
            found.append("mask_focus_loss=true: needs mask_ratio above 0")
        if self.lambda_temporal and not self.has_frame_term:
            found.append(f"lambda_temporal: temporal_mode={self.temporal_mode} has no frame term; use frame or hybrid")
        if self.lambda_delta and not self.has_delta_term:
            found.append(f"lambda_delta: temporal_mode={self.temporal_mode} has no delta term; use delta or hybrid")
        if 0 < self.temporal_max_steps <= self.temporal_warmup_steps:
            found.append(f"temporal_warmup_steps={self.temporal_warmup_steps}: must be below temporal_max_steps")
        if self.is_off:
            found.append("at least one of lambda_self_flow, lambda_temporal and lambda_delta must be above 0")
        by_index = self.student_block_ratio is None and self.teacher_block_ratio is None
        if by_index and self.teacher_block_idx <= self.student_block_idx:
            found.append(
                f"teacher_block_idx={self.teacher_block_idx}: must be deeper than student_block_idx "
                f"({self.student_block_idx})"
            )
        return found

    def notes(self) -> list[str]:
        """Settings without effect."""
        found = []
        for term, weight in (("frame", "lambda_temporal"), ("delta", "lambda_delta")):
            if getattr(self, f"has_{term}_term") and not getattr(self, weight):
                found.append(f"temporal_mode={self.temporal_mode} has no effect on {term}s without {weight}")
        if self.temporal_schedule != "constant" and not self.temporal_max_steps:
            found.append(f"temporal_schedule={self.temporal_schedule} does not decay without temporal_max_steps")
        if self.teacher_mode == "base":
            defaults = SelfFlowOptions()
            for name in ("teacher_momentum", "teacher_update_interval", "offload_teacher_params"):
                if getattr(self, name) != getattr(defaults, name):
                    found.append(f"{name} has no effect with teacher_mode=base")
        return found


@dataclass(frozen=True)
class RegularizerOptions:
    """Every regularizer of a run; None for those that are off."""

    preservation: PreservationOptions = field(default_factory=PreservationOptions)
    crepa: CrepaOptions | None = None
    self_flow: SelfFlowOptions | None = None


def at_least(options: object, smallest: int, *names: str) -> list[str]:
    """A sentence for each field below `smallest`, or not finite."""
    return [
        f"{name}={getattr(options, name):g}: must be at least {smallest}"
        for name in names
        if not smallest <= getattr(options, name) < math.inf
    ]


def above_zero(options: object, *names: str) -> list[str]:
    """A sentence for each field that is not a finite number above 0."""
    return [
        f"{name}={getattr(options, name):g}: must be above 0"
        for name in names
        if not 0 < getattr(options, name) < math.inf
    ]


def keys_of(options: type) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Key -> (type as annotated, allowed words) of an options class."""
    return {spec.name: (spec.type, spec.metadata.get("choices", ())) for spec in fields(options)}
