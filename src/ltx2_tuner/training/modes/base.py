"""What a training mode is: it turns a batch and its draws into model inputs and targets.

The loop never asks which mode it runs. Legend: B batch, T tokens, C channels, S text tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ltx2_tuner.devices import send
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.modes.streams import StreamTask, Text


@dataclass(frozen=True)
class AudioReferenceOptions:
    """How reference sound is set apart; all off by default, all on in the published ID-LoRA recipe.

    negative_positions: the reference lies before time 0 instead of beside the target. hidden_from_video: the picture
    does not attend to it. hidden_from_text: it does not attend to the text.
    """

    negative_positions: bool = False
    hidden_from_video: bool = False
    hidden_from_text: bool = False


@dataclass(frozen=True)
class ModeOptions:
    """What the modes can be told.

    sequence_resolution: pixels of the virtual picture that audio-only training takes its shift from, 0 = the cached
    size. silence_*: train items without sound on silence. audio_step_seconds: seconds of one audio latent step.
    audio_width: channels of an audio token. reference_downscale: reference videos are this many times smaller.
    audio_reference: how reference sound is set apart from the target.
    """

    video_weight: float = 1.0
    audio_weight: float = 1.0
    independent_audio: bool = False
    sequence_resolution: int = 64
    silence_regularizer: bool = False
    silence_weight: float = 1.0
    audio_step_seconds: float = 0.04
    audio_width: int = 128
    reference_downscale: int = 1
    audio_reference: AudioReferenceOptions = field(default_factory=AudioReferenceOptions)


@dataclass(frozen=True)
class Prepared:
    """Inputs of one forward, and what its outputs are compared with. Streams that are not trained are None."""

    video: Modality | None
    audio: Modality | None
    video_task: StreamTask | None
    audio_task: StreamTask | None
    video_weight: float
    audio_weight: float
    has_audio: bool

    def run(self, model: LTXTransformer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Predicted velocities of the target tokens, (B, N, C) each."""
        video, audio = model(self.video, self.audio)
        if video is not None:
            video = self.video_task.outputs(video)
        if audio is not None:
            audio = self.audio_task.outputs(audio)
        return video, audio


class Mode(Protocol):
    """One way of training: video, av, audio, or one of these with references."""

    name: str
    lora_preset: str
    options: ModeOptions

    def prepare(self, batch: dict, draws: Draws) -> Prepared:
        """Inputs and targets of a batch (document: the batch dictionary of `data.batches`).

        Raises:
            UserError: the caches lack what the mode needs.
        """


@dataclass(frozen=True)
class Compute:
    """Where and in which dtype the model runs, and the blank prompt for dropped captions (None: zeros)."""

    device: torch.device
    dtype: torch.dtype
    blank: Text | None = None

    def modality(self, task: StreamTask, context: torch.Tensor, context_mask: torch.Tensor | None) -> Modality:
        """The model's record of one stream. Noise levels and positions stay float32 whatever the dtype."""
        sigma = send(task.sigma, self.device)
        levels, index = sigma[:, None], None
        if task.clean is not None:
            # Two distinct levels per sample are embedded once each, whatever the number of tokens.
            levels = torch.stack([sigma, torch.zeros_like(sigma)], dim=1)  # (B, 2)
            index = task.clean.long()
        return Modality(
            latent=task.latent.to(self.dtype),
            sigma=sigma,
            timesteps=levels,
            positions=task.positions,
            context=send(context, self.device, self.dtype),
            context_mask=None if context_mask is None else send(context_mask, self.device),
            attention_mask=None if task.valid is None else task.valid[:, None].float(),
            timestep_index=index,
            cross_mask=task.valid if task.visible is None else task.visible,
            text_keep=task.reads_text,
        )


def loss_weight(batch: dict, stream: str, default: float) -> float:
    """The dataset's weight for a stream if it sets one, else the default."""
    weight = batch.get(f"{stream}_loss_weight")
    return default if weight is None else float(weight)
