"""Picture-only training."""

from __future__ import annotations

import torch

from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.modes.base import Compute, ModeOptions, Prepared, loss_weight
from ltx2_tuner.training.modes.streams import StreamTask, batch_fps, batch_text, video_task


class VideoMode:
    """Noisy picture tokens, no sound stream."""

    name = "video"
    lora_preset = "t2v"

    def __init__(self, options: ModeOptions, compute: Compute) -> None:
        self.options = options
        self.compute = compute

    def prepare(self, batch: dict, draws: Draws) -> Prepared:
        latents = batch["latents"]["latents"]  # (B, C, F, H, W)
        count = len(latents)
        fps = batch_fps(batch, count)
        text = batch_text(batch, draws.caption_dropout(count), self.compute.blank)
        first_frame = draws.first_frame(count)
        sigma = draws.sigma(video_tokens(latents), batch_buckets(batch))
        noise = draws.noise((count, latents[0, 0].numel(), latents.shape[1]))
        task = self.condition(video_task(latents, fps, sigma, noise, first_frame), batch, fps)
        return Prepared(
            video=self.compute.modality(task, text.video, text.mask),
            audio=None,
            video_task=task,
            audio_task=None,
            video_weight=loss_weight(batch, "video", self.options.video_weight),
            audio_weight=0.0,
            has_audio=False,
        )

    def condition(self, task: StreamTask, batch: dict, fps: torch.Tensor) -> StreamTask:
        """The task with what else the picture is given; nothing here. fps (B,)."""
        return task


def video_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) of each sample of latents (B, C, F, H, W)."""
    return torch.full((len(latents),), latents[0, 0].numel())


def batch_buckets(batch: dict) -> torch.Tensor | None:
    """Stratified values (B,) of --num_timestep_buckets, None without."""
    values = batch.get("timesteps")
    return None if values is None else torch.tensor(values, dtype=torch.float32)
