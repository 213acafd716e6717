"""Self-Flow: features of the model in training are drawn to those of a teacher that sees a cleaner view of the clip.

Some tokens of the student get a second noise level; the teacher sees all tokens at the lower of the two, with the same
noise. Legend: B batch, T tokens, C channels, D width, F/H/W latent frames, height, width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx2_tuner.devices import send
from ltx2_tuner.models.transformer import Modality
from ltx2_tuner.training.draws import TrainingDraws
from ltx2_tuner.training.modes import Prepared
from ltx2_tuner.training.modes.streams import StreamTask
from ltx2_tuner.training.regularizers.base import Regularizer, TensorGroups, Trained, Work
from ltx2_tuner.training.regularizers.ema import Shadows
from ltx2_tuner.training.regularizers.options import SelfFlowOptions
from ltx2_tuner.training.regularizers.passes import Passes, switched_off
from ltx2_tuner.training.regularizers.projector import load_if_it_fits, seeded
from ltx2_tuner.training.regularizers.schedule import schedule_factor
from ltx2_tuner.training.regularizers.self_flow_losses import (
    delta_cosine,
    frame_cosine,
    motion_weights,
    penalty,
    token_cosine,
)

logger = logging.getLogger(__name__)

PROJECTOR = "self_flow_projector"
TEACHER = "self_flow_teacher_ema"


@dataclass(frozen=True)
class DualNoise:
    """The noise levels of a micro-batch.

    first (B,), second (B,): the two levels, on the CPU. mask (B, T): tokens at the second one, on the CPU.
    """

    first: Tensor
    second: Tensor
    mask: Tensor

    @property
    def lower(self) -> Tensor:
        """(B,) level of the teacher."""
        return torch.minimum(self.first, self.second)

    @property
    def levels(self) -> Tensor:
        """(B, T) level of each token of the student."""
        return torch.where(self.mask, self.second[:, None], self.first[:, None])


class SelfFlow(Regularizer):
    """Alignment of projected student tokens with the teacher's, and of both over time.

    Args:
        blocks: student and teacher block.
        width: of the video stream inside the model.
        learning_rate: of the run; the options may give the projector its own.
    """

    metric = "loss/self_flow"
    cost = "+1 forward up to the teacher block"

    def __init__(
        self,
        options: SelfFlowOptions,
        passes: Passes,
        *,
        blocks: tuple[int, int],
        width: int,
        seed: int,
        device: torch.device,
        learning_rate: float,
    ) -> None:
        self.options = options
        self.passes = passes
        self.student, self.teacher = blocks
        self.learning_rate = options.projector_lr or learning_rate
        hidden = width * options.projector_hidden_multiplier
        layers = seeded(
            lambda: nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width)), seed, PROJECTOR
        )
        self.projector = layers.to(device)
        self.shadows: Shadows | None = None
        if options.teacher_mode != "base":
            block = self.teacher if options.teacher_mode == "partial_ema" else None
            self.shadows = Shadows(
                passes.network,
                block,
                options.teacher_momentum,
                options.teacher_update_interval,
                options.offload_teacher_params,
            )
        self._chosen = self.student  # block of this micro-batch
        self._features: Tensor | None = None
        self._raised: Tensor | None = None  # tokens noisier than the teacher's

    def prepare(self, work: Work) -> None:
        task = work.prepared.video_task
        noise = self._draw(work, task)
        self._chosen = self._draw_block(work.draws)
        factor = self._factor(work.step)
        self._features = None
        if factor > 0:
            self._features = self._teach(work.prepared.video, task, noise)
        self._raised = noise.mask & (noise.second > noise.first)[:, None]
        if task.clean is not None:
            self._raised = send(self._raised, task.clean.device) & ~task.clean  # there: the host need not wait
        levels = noise.levels
        work.prepared = self._student(work.prepared, noise)
        work.metrics |= {
            "self_flow/masked_token_ratio": float(noise.mask.float().mean()),
            "self_flow/tau_mean": float(levels.mean()),
            "self_flow/tau_min_mean": float(noise.lower.mean()),
            "self_flow/lambda_self_flow": self.options.lambda_self_flow * factor,
            "self_flow/lambda_temporal": self.options.lambda_temporal * factor,
            "self_flow/lambda_delta": self.options.lambda_delta * factor,
        }

    def _factor(self, step: int) -> float:
        options = self.options
        kind = options.temporal_schedule if options.temporal_max_steps else "constant"
        return schedule_factor(kind, step, options.temporal_warmup_steps, options.temporal_max_steps)

    def _draw(self, work: Work, task: StreamTask) -> DualNoise:
        """The second noise level and the mask; without dual noise both levels are one."""
        count, tokens = task.target.shape[:2]
        nothing = torch.zeros(count, tokens, dtype=torch.bool)
        if not self.options.dual_timestep:
            return DualNoise(task.sigma, task.sigma, nothing)
        second = work.draws.sigma(torch.full((count,), tokens))
        ratio = self.options.mask_ratio
        if self.options.frame_level_mask:
            frames = work.grid[0]
            masked = work.draws.uniform(count, frames) < ratio
            return DualNoise(task.sigma, second, masked.repeat_interleave(tokens // frames, dim=1))
        return DualNoise(task.sigma, second, work.draws.uniform(count, tokens) < ratio)

    def _draw_block(self, draws: TrainingDraws) -> int:
        """The student block of this micro-batch."""
        reach = self.options.student_block_stochastic_range
        if not reach:
            return self.student
        first, last = max(0, self.student - reach), min(self.teacher - 1, self.student + reach)
        return first + int(draws.uniform(1) * (last - first + 1))

    def _student(self, prepared: Prepared, noise: DualNoise) -> Prepared:
        """The inputs with two noise levels; target and noise stay."""
        if not self.options.dual_timestep:
            return prepared
        task, video = prepared.video_task, prepared.video
        device = task.latent.device
        levels = noise.levels
        latent = at_level(task, send(levels, device))
        sigma = levels.mean(dim=1)
        zero = torch.zeros_like(sigma)
        if self.options.tokenwise_timestep:
            known = torch.stack([noise.first, noise.second, zero], dim=1)  # (B, 3)
            index = send(noise.mask, device).long()
            index = index if task.clean is None else index.masked_fill(task.clean, 2)
        else:
            known, index = torch.stack([sigma, zero], dim=1), None  # (B, 2)
            if task.clean is None:
                known = known[:, :1]
            else:
                index = task.clean.long()
        video = dataclasses.replace(
            video,
            latent=latent.to(video.latent.dtype),
            sigma=send(sigma, device),
            timesteps=send(known, device),
            timestep_index=index,
        )
        task = dataclasses.replace(task, latent=latent, sigma=sigma)
        return dataclasses.replace(prepared, video=video, video_task=task)

    def _teach(self, video: Modality, task: StreamTask, noise: DualNoise) -> Tensor:
        """Features (B, T, D) of the teacher, which sees every token at the lower level."""
        device = task.latent.device
        lower = send(noise.lower, device)
        latent = at_level(task, lower[:, None].expand(task.latent.shape[:2]))
        levels = lower[:, None] if task.clean is None else torch.stack([lower, torch.zeros_like(lower)], dim=1)
        view = dataclasses.replace(video, latent=latent.to(video.latent.dtype), sigma=lower, timesteps=levels)
        with self._teacher_network():
            features = self.passes.features(view, self.teacher)
        return _parked(features) if self.options.offload_teacher_features else features

    def _teacher_network(self) -> contextlib.AbstractContextManager:
        return switched_off(self.passes.network) if self.shadows is None else self.shadows.in_place()

    def blocks(self) -> Collection[int]:
        return () if self._features is None else (self._chosen,)

    def loss(self, work: Work) -> Tensor | None:
        if self._features is None:
            return None
        student = work.hidden[self._chosen]
        teacher = send(self._features, student.device).float()
        self._features = None
        options, factor = self.options, self._factor(work.step)
        parts = []
        if options.lambda_self_flow:
            chosen = send(self._raised, student.device) if options.mask_focus_loss else None
            with self.passes.autocast():
                projected = self.projector(student.float()).float()
            cosine = token_cosine(projected, teacher, chosen)
            work.metrics["self_flow/cosine"] = cosine.detach()
            parts.append(options.lambda_self_flow * penalty(cosine, options.loss_type))
        parts += self._temporal(work, student, teacher)
        if not parts:
            return None
        total = factor * sum(parts[1:], parts[0])
        if options.max_loss:
            size = total.detach().abs()
            total = total * torch.where(size > options.max_loss, options.max_loss / size, 1.0)
        return total

    def _temporal(self, work: Work, student: Tensor, teacher: Tensor) -> list[Tensor]:
        """The terms over time; none for single frames."""
        options, (frames, height, width) = self.options, work.grid
        if frames < 2 or not (options.lambda_temporal or options.lambda_delta):
            return []
        h, t = (states.unflatten(1, (frames, height * width)) for states in (student.float(), teacher))
        motion = motion_weights(t, options)
        parts = []
        if options.lambda_temporal:
            cosine = frame_cosine(h, t, motion, options, (height, width))
            work.metrics["self_flow/frame_cosine"] = cosine.detach()
            parts.append(options.lambda_temporal * penalty(cosine, options.loss_type))
        if options.lambda_delta:
            cosine = delta_cosine(h, t, motion, options)
            work.metrics["self_flow/delta_cosine"] = cosine.detach()
            parts.append(options.lambda_delta * penalty(cosine, options.loss_type))
        return parts

    def after_step(self) -> None:
        if self.shadows is not None:
            self.shadows.after_step()

    def trained(self) -> list[Trained]:
        return [Trained(PROJECTOR, self.projector, self.learning_rate)]

    def state(self) -> TensorGroups:
        groups = {PROJECTOR: self.projector.state_dict()}
        return groups if self.shadows is None else {**groups, TEACHER: self.shadows.state()}

    def load_state(self, groups: TensorGroups, folder: Path) -> None:
        if PROJECTOR in groups:
            load_if_it_fits(self.projector, groups[PROJECTOR], f"{folder.name}/{PROJECTOR}.safetensors")
        else:
            logger.warning("%s holds no %s: the projector starts fresh", folder, PROJECTOR)
        if TEACHER in groups and self.shadows is None:
            logger.warning("%s holds an EMA teacher, which teacher_mode=base does not use", folder)
        elif TEACHER in groups:
            self.shadows.load(groups[TEACHER], f"{folder.name}/{TEACHER}.safetensors")
        elif self.shadows is not None:
            logger.warning("%s holds no %s: the teacher starts as a copy of the network", folder, TEACHER)


def _parked(features: Tensor) -> Tensor:
    """A copy in host memory; the copies there and back are in the order of the stream, so nothing waits for them."""
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=features.is_cuda)
    return host.copy_(features, non_blocking=True)


def at_level(task: StreamTask, levels: Tensor) -> Tensor:
    """The task's tokens (B, T, C) at other noise levels (B, T), with the same noise; conditioning stays clean.

    x_s = (1 - s) clean + s noise is a line in s whose slope is the target.
    """
    moved = levels - send(task.sigma, levels.device)[:, None]
    if task.clean is not None:
        moved = moved.masked_fill(task.clean, 0.0)
    return task.latent + moved[..., None] * task.target
