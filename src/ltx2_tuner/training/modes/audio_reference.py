"""In-context training with a reference voice: clean reference sound behind the noisy target sound.

Legend: B batch, T target tokens, R reference tokens, C channels.
"""

from __future__ import annotations

import dataclasses

import torch

from ltx2_tuner.devices import send
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer.tokens import audio_positions
from ltx2_tuner.training.modes.audio import AudioMode
from ltx2_tuner.training.modes.av import AVMode
from ltx2_tuner.training.modes.base import ModeOptions
from ltx2_tuner.training.modes.streams import StreamTask, audio_tokens


class AudioReferenceAVMode(AVMode):
    """Picture and sound, the sound with a reference voice."""

    name = "audio_ref_only_ic av"
    lora_preset = "audio_ref_only_ic"

    def condition(self, task: StreamTask, batch: dict) -> StreamTask:
        return with_batch_reference(task, batch, self.options)


class AudioReferenceAudioMode(AudioMode):
    """Sound alone, with a reference voice."""

    name = "audio_ref_only_ic audio"
    lora_preset = "audio"

    def condition(self, task: StreamTask, batch: dict) -> StreamTask:
        return with_batch_reference(task, batch, self.options)


def with_batch_reference(task: StreamTask, batch: dict, options: ModeOptions) -> StreamTask:
    """The task followed by the batch's reference sound.

    Raises:
        UserError: an item has no reference sound, or an empty one.
    """
    lengths = batch.get("ref_audio_lengths")
    if lengths is None or not bool(lengths.all()):
        item = batch["item_keys"][0 if lengths is None else int((lengths == 0).nonzero()[0])]
        raise UserError(
            f"{item} has no reference sound; give its dataset a reference_audio_directory with a file of its name and "
            "a reference_audio_cache_directory, and run ltx2_cache_latents.py"
        )
    tokens = audio_tokens(batch["ref_audio_latents"]["latents"])
    if tokens.shape[2] != task.latent.shape[2]:
        raise UserError(
            f"{batch['item_keys'][0]}: its reference sound has {tokens.shape[2]} values a step, its own sound "
            f"{task.latent.shape[2]}; run ltx2_cache_latents.py again for both"
        )
    return with_audio_reference(task, tokens, lengths, options)


def with_audio_reference(
    task: StreamTask, reference: torch.Tensor, lengths: torch.Tensor, options: ModeOptions
) -> StreamTask:
    """Put clean reference tokens (B, R, C), of which the first `lengths` (B,) (CPU) are real, behind the target.

    Both parts start at time 0; with negative positions each sample's reference ends one latent step before it.
    """
    settings, device = options.audio_reference, task.latent.device
    batch, count, _ = reference.shape
    positions = audio_positions(count, batch=batch, device=device)  # (B, 1, R, 2)
    if settings.negative_positions:
        samples, ends = torch.arange(batch, device=device), send(lengths.long() - 1, device)
        last = positions[samples, 0, ends, 1]  # (B,)
        positions = positions - last[:, None, None, None] - options.audio_step_seconds
    target = torch.zeros(task.latent.shape[:2], dtype=torch.bool, device=device)
    given = torch.ones(batch, count, dtype=torch.bool, device=device)
    clean = torch.cat([target, given], dim=1)  # (B, T + R)
    valid = _valid(task, lengths, count)
    visible = None
    if settings.hidden_from_video:
        visible = ~clean if valid is None else valid & ~clean
    return dataclasses.replace(
        task,
        latent=torch.cat([task.latent, send(reference, device, torch.float32)], dim=1),
        positions=torch.cat([task.positions, positions], dim=2),
        clean=clean,
        valid=valid,
        visible=visible,
        reads_text=~clean if settings.hidden_from_text else None,
    )


def _valid(task: StreamTask, lengths: torch.Tensor, count: int) -> torch.Tensor | None:
    """Tokens (B, T + R) that are not padding; None when all are.

    The reference of a sample without sound of its own counts as padding: that sample is trained as if it were alone.
    """
    if task.valid is None and bool((lengths == count).all()):
        return None
    target = torch.ones_like(task.mask) if task.valid is None else task.valid
    device = target.device
    reference = torch.arange(count, device=device)[None] < send(lengths, device)[:, None]
    return torch.cat([target, reference & target.any(dim=1, keepdim=True)], dim=1)
