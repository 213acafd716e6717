"""Picture and sound together; a batch may mix items with and without sound."""

from __future__ import annotations

import math

import torch

from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.modes.base import Compute, ModeOptions, Prepared, loss_weight
from ltx2_tuner.training.modes.streams import (
    StreamTask,
    audio_task,
    audio_tokens,
    batch_fps,
    batch_text,
    require_audio_text,
    video_task,
)
from ltx2_tuner.training.modes.video import batch_buckets, video_tokens


class AVMode:
    """Noisy picture and sound tokens. Each sample behaves as if it were alone in its batch.

    silence: tokens (T, C) of encoded silence for the silence regularizer, None for the zero latent.
    """

    name = "av"
    lora_preset = "t2v"

    def __init__(self, options: ModeOptions, compute: Compute, silence: torch.Tensor | None = None) -> None:
        self.options = options
        self.compute = compute
        self.silence = silence

    def prepare(self, batch: dict, draws: Draws) -> Prepared:
        latents = batch["latents"]["latents"]  # (B, C, F, H, W)
        count = len(latents)
        fps = batch_fps(batch, count)
        text = batch_text(batch, draws.caption_dropout(count), self.compute.blank)
        first_frame = draws.first_frame(count)
        sigma = draws.sigma(video_tokens(latents), batch_buckets(batch))
        noise = draws.noise((count, latents[0, 0].numel(), latents.shape[1]))
        video = video_task(latents, fps, sigma, noise, first_frame)
        sound = self._sound(batch, latents.shape[2], fps)
        audio_weight = loss_weight(batch, "audio", self.options.audio_weight)
        task, modality, has_audio = None, None, False
        if sound is not None:
            clean, lengths, weights, has_audio = sound
            if weights is not None and not has_audio:
                audio_weight, weights = audio_weight * self.options.silence_weight, None
            task = self.condition(self._audio_task(clean, lengths, weights, sigma, draws), batch)
            modality = self.compute.modality(task, require_audio_text(text, batch, "av"), text.mask)
        return Prepared(
            video=self.compute.modality(video, text.video, text.mask),
            audio=modality,
            video_task=video,
            audio_task=task,
            video_weight=loss_weight(batch, "video", self.options.video_weight),
            audio_weight=audio_weight,
            has_audio=has_audio,
        )

    def condition(self, task: StreamTask, batch: dict) -> StreamTask:
        """The task with what else the sound is given; nothing here."""
        return task

    def _audio_task(
        self,
        clean: torch.Tensor,
        lengths: torch.Tensor,
        weights: torch.Tensor | None,
        sigma: torch.Tensor,
        draws: Draws,
    ) -> StreamTask:
        if self.options.independent_audio:
            sigma = draws.audio_sigma(lengths.clamp(min=1))
        return audio_task(clean, lengths, sigma, draws.noise(tuple(clean.shape)), weights)

    def _sound(
        self, batch: dict, frames: int, fps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool] | None:
        """Clean tokens (B, T, C), lengths (B,), loss factors (B,) or None, and whether any of it is real sound.

        None when no item has sound and silence is not trained.
        """
        tokens = audio_tokens(batch["audio_latents"]["latents"]) if "audio_latents" in batch else None
        lengths = batch.get("audio_lengths", torch.zeros(len(fps), dtype=torch.int32))
        silent = lengths == 0
        has_audio = not bool(silent.all())
        if not bool(silent.any()):
            return tokens, lengths, None, True
        if not self.options.silence_regularizer:
            return (tokens, lengths, None, True) if has_audio else None
        return *self._add_silence(tokens if has_audio else None, lengths, frames, fps), has_audio

    def _add_silence(
        self, tokens: torch.Tensor | None, lengths: torch.Tensor, frames: int, fps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give every item without sound as much silence as its clip is long."""
        steps = [self._silent_steps(frames, rate) for rate in fps.tolist()]
        silent = (lengths == 0).tolist()
        real = 0 if tokens is None else tokens.shape[1]
        longest = max([real, *(count for count, is_silent in zip(steps, silent) if is_silent)])
        filled = torch.zeros(len(lengths), longest, self.options.audio_width)
        if tokens is not None:
            filled[:, :real] = tokens
        lengths = lengths.clone()
        weights = torch.ones(len(lengths))
        for index, count in enumerate(steps):
            if silent[index]:
                filled[index] = 0
                filled[index, :count] = self._silence_tokens(count)
                lengths[index] = count
                weights[index] = self.options.silence_weight
        return filled, lengths, weights

    def _silent_steps(self, frames: int, fps: float) -> int:
        seconds = ((frames - 1) * 8 + 1) / fps
        return max(math.floor(seconds / self.options.audio_step_seconds + 1e-6), 1)

    def _silence_tokens(self, count: int) -> torch.Tensor:
        if self.silence is None:
            return torch.zeros(count, self.options.audio_width)
        repeats = math.ceil(count / len(self.silence))
        return self.silence.repeat(repeats, 1)[:count]
