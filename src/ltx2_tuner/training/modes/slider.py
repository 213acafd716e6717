"""Slider training: each batch becomes two passes with opposite multipliers, whose gradients one step adds up.

Legend: B batch, T tokens, C channels, F/H/W latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ltx2_tuner.devices import send
from ltx2_tuner.models.transformer import Modality
from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.modes.base import Compute, ModeOptions, Prepared
from ltx2_tuner.training.modes.streams import batch_fps, batch_text, video_task
from ltx2_tuner.training.modes.video import VideoMode, video_tokens

_EPS = 1e-8

# Velocities (B, T, C) of the plain model for a stream, whatever the network.
Plain = Callable[[Modality], torch.Tensor]


class TextSliderMode:
    """One noise tensor, seen as noise at a level: what the plain model says of it spans the direction."""

    name = "slider"
    lora_preset = "t2v"

    def __init__(self, options: ModeOptions, compute: Compute) -> None:
        self.options = options
        self.compute = compute

    def prepare(self, batch: dict, draws: Draws) -> Prepared:
        """The class prompt at x = sigma * noise; its target is the plain velocity until `passes` replaces it."""
        latents = batch["latents"]["latents"]  # (B, C, F, H, W), zeros
        count = len(latents)
        text = batch_text(batch, torch.zeros(count, dtype=torch.bool))
        sigma = draws.sigma(video_tokens(latents))
        noise = draws.noise((count, latents[0, 0].numel(), latents.shape[1]))
        task = video_task(latents, batch_fps(batch, count), sigma, noise, first_frame=None)
        return Prepared(
            video=self.compute.modality(task, text.video, text.mask),
            audio=None,
            video_task=task,
            audio_task=None,
            video_weight=batch["video_loss_weight"],
            audio_weight=0.0,
            has_audio=False,
        )

    def passes(self, batch: dict, draws: Draws, plain: Plain) -> Iterator[tuple[float, Prepared]]:
        """(multiplier, inputs and target) of the two passes."""
        prepared = self.prepare(batch, draws)
        neutral = plain(prepared.video).float()
        positive = plain(self._with_text(prepared.video, batch["positive"])).float()
        negative = plain(self._with_text(prepared.video, batch["negative"])).float()
        shift = batch["guidance"] * (positive - negative)
        for multiplier in (1.0, -1.0):
            target = match_statistics(neutral + multiplier * shift, neutral)
            yield multiplier, replace(prepared, video_task=replace(prepared.video_task, target=target))

    def _with_text(self, modality: Modality, text: torch.Tensor) -> Modality:
        return replace(modality, context=send(text, self.compute.device, self.compute.dtype), context_mask=None)


def match_statistics(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` with the mean and (unbiased) standard deviation of the whole of `like`."""
    return (value - value.mean()) / (value.std() + _EPS) * like.std() + like.mean()


class ReferenceSliderMode(VideoMode):
    """The same noise, level and first-frame decision for both of a pair; `prepare` alone is the positive one."""

    name = "slider"

    def passes(self, batch: dict, draws: Draws, plain: Plain) -> Iterator[tuple[float, Prepared]]:
        """(multiplier, inputs and target): the positive of the pair at +1, the negative at -1."""
        same = _SameDraws(draws)
        yield 1.0, self.prepare(batch, same)
        yield -1.0, self.prepare({**batch, "latents": batch["ref_latents"]}, same)


class _SameDraws:
    """Draws that answer a question the second time as they did the first time."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._answers: dict[str, torch.Tensor] = {}

    def __getattr__(self, question: str) -> Callable[..., torch.Tensor]:
        def answer(*args: object) -> torch.Tensor:
            if question not in self._answers:
                self._answers[question] = getattr(self._draws, question)(*args)
            return self._answers[question]

        return answer
