"""Sound-only training: no picture stream, so neither cross-modal attention runs."""

from __future__ import annotations

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.modes.base import Compute, ModeOptions, Prepared, loss_weight
from ltx2_tuner.training.modes.streams import StreamTask, audio_task, audio_tokens, batch_text, require_audio_text
from ltx2_tuner.training.modes.video import batch_buckets


class AudioMode:
    """Noisy sound tokens; the noise level's shift comes from the picture that would go with the sound."""

    name = "audio"
    lora_preset = "audio"

    def __init__(self, options: ModeOptions, compute: Compute) -> None:
        self.options = options
        self.compute = compute

    def prepare(self, batch: dict, draws: Draws) -> Prepared:
        if "audio_latents" not in batch:
            raise UserError(
                f"{batch['item_keys'][0]} has no audio cache; re-run ltx2_cache_latents.py --ltx2_mode audio"
            )
        clean = audio_tokens(batch["audio_latents"]["latents"])  # (B, T, C)
        count = len(clean)
        lengths = batch["audio_lengths"]
        text = batch_text(batch, draws.caption_dropout(count), self.compute.blank)
        context = require_audio_text(text, batch, "audio")
        sigma = draws.sigma(self._virtual_tokens(batch), batch_buckets(batch))
        task = self.condition(audio_task(clean, lengths, sigma, draws.noise(tuple(clean.shape))), batch)
        return Prepared(
            video=None,
            audio=self.compute.modality(task, context, text.mask),
            video_task=None,
            audio_task=task,
            video_weight=0.0,
            audio_weight=loss_weight(batch, "audio", self.options.audio_weight),
            has_audio=True,
        )

    def condition(self, task: StreamTask, batch: dict) -> StreamTask:
        """The task with what else the sound is given; nothing here."""
        return task

    def _virtual_tokens(self, batch: dict) -> torch.Tensor:
        """Tokens (B,) of the virtual picture of each sample."""
        geometry = batch["latents"]
        resolution = self.options.sequence_resolution
        if resolution:
            tokens = geometry["num_frames"].long() * max(resolution // 32, 1) ** 2
        else:
            tokens = geometry["num_frames"].long() * geometry["height"].long() * geometry["width"].long()
        if bool((tokens <= 1).any()):
            raise UserError(
                f"{batch['item_keys'][int(tokens.argmin())]}: the audio caches carry no virtual geometry; "
                "re-run ltx2_cache_latents.py --ltx2_mode audio"
            )
        return tokens
