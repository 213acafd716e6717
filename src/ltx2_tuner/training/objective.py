"""The loss of one micro-batch: both streams, their weights, and what is logged about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ltx2_tuner.training.balance import AudioBalancer
from ltx2_tuner.training.losses import StreamLoss, element_loss, reduce_loss
from ltx2_tuner.training.modes import Prepared
from ltx2_tuner.training.modes.streams import StreamTask
from ltx2_tuner.training.options import LossOptions


@dataclass(frozen=True)
class LossTerms:
    """total: scalar for backward. video, audio: unweighted losses, None for streams that are not trained."""

    total: torch.Tensor
    video: StreamLoss | None
    audio: StreamLoss | None
    audio_weight: float | torch.Tensor

    def detached(self) -> LossTerms:
        """The same numbers without the graph, so that keeping them keeps no activations."""
        weight = self.audio_weight.detach() if isinstance(self.audio_weight, torch.Tensor) else self.audio_weight
        return LossTerms(self.total.detach(), _detach(self.video), _detach(self.audio), weight)


def _detach(loss: StreamLoss | None) -> StreamLoss | None:
    return None if loss is None else StreamLoss(loss.mean.detach(), loss.per_sample.detach(), loss.active)


def task_loss(
    prepared: Prepared,
    video: torch.Tensor | None,
    audio: torch.Tensor | None,
    options: LossOptions,
    balancer: AudioBalancer | None = None,
) -> LossTerms:
    """Loss of predictions (B, N, C) against a prepared batch; `balancer` None keeps the base audio weight."""
    video_loss = _stream_loss(video, prepared.video_task, options)
    audio_loss = _stream_loss(audio, prepared.audio_task, options)
    audio_weight: float | torch.Tensor = prepared.audio_weight
    if balancer is not None and video_loss is not None:
        audio_weight = balancer.weight(
            prepared.audio_weight, video_loss.mean, None if audio_loss is None else audio_loss.mean
        )
    parts = []
    if video_loss is not None:
        parts.append(prepared.video_weight * video_loss.weighted(prepared.video_task.sample_weights))
    if audio_loss is not None:
        parts.append(audio_weight * audio_loss.weighted(prepared.audio_task.sample_weights))
    return LossTerms(sum(parts[1:], parts[0]), video_loss, audio_loss, audio_weight)


def _stream_loss(prediction: torch.Tensor | None, task: StreamTask | None, options: LossOptions) -> StreamLoss | None:
    if task is None or prediction is None:
        return None
    return reduce_loss(element_loss(prediction, task.target, options.kind, options.huber_delta), task.mask)


def band_losses(prefix: str, sigmas: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """Mean loss per band of noise levels: `<prefix>/sigma_low`, `_mid`, `_high`; empty bands are absent."""
    bands: dict[str, list[float]] = {}
    for sigma, loss in zip(sigmas, losses):
        band = "low" if sigma < 0.1 else "mid" if sigma <= 0.5 else "high"
        bands.setdefault(f"{prefix}/sigma_{band}", []).append(loss)
    return {name: sum(values) / len(values) for name, values in bands.items()}
