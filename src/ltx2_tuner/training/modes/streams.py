"""From cached latents and text to one modality's model inputs and target.

Legend: B batch, T tokens, C channels, F/H/W latent frames, height, width, S text tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltx2_tuner.devices import send
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer.tokens import audio_positions, patchify_audio, patchify_video, video_positions
from ltx2_tuner.training.flow import add_noise, velocity

DEFAULT_FPS = 25.0


@dataclass(frozen=True)
class StreamTask:
    """What one stream gets and what it is asked for.

    latent (B, T, C) float32 noisy tokens; sigma (B,) float32 on the CPU; positions (B, axes, T, 2) float32; target
    (B, N, C) float32, of the N tokens from `first_output` on; mask (B, N) bool, true where the loss counts; clean
    (B, T) bool, true on conditioning tokens, None when there are none; sample_weights (B,) or None, factors of the
    samples' losses; valid (B, T) bool, false on padding, which nothing may attend to, None without padding; visible
    (B, T) bool, tokens that the other stream may attend to, None for all valid ones; reads_text (B, T) bool, tokens
    that attend to the text, None for all.
    """

    latent: torch.Tensor
    sigma: torch.Tensor
    positions: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    clean: torch.Tensor | None = None
    first_output: int = 0
    sample_weights: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    reads_text: torch.Tensor | None = None

    def outputs(self, prediction: torch.Tensor) -> torch.Tensor:
        """The target tokens (B, N, C) of a prediction (B, T, C)."""
        return prediction[:, self.first_output : self.first_output + self.target.shape[1]]

    def timesteps(self) -> torch.Tensor:
        """Noise level of every token, (B, T): 0 on conditioning tokens."""
        levels = send(self.sigma, self.latent.device)[:, None].expand(self.latent.shape[:2])
        return levels if self.clean is None else levels.masked_fill(self.clean, 0.0)


def video_task(
    latents: torch.Tensor,
    fps: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    first_frame: torch.Tensor | None,
) -> StreamTask:
    """The picture stream of latents (B, C, F, H, W).

    fps (B,); sigma (B,) on the CPU; noise (B, T, C) on the compute device; first_frame (B,) bool on the CPU: samples
    whose first latent frame is given clean (no effect on single frames), None where that is never done. Where it may
    be done, all batches are alike in form: a compiled pass serves those with and without clean tokens.
    """
    batch, _, frames, height, width = latents.shape
    device = noise.device
    tokens = patchify_video(send(latents, device, torch.float32))  # (B, T, C)
    levels = send(sigma, device)[:, None]  # (B, 1)
    clean = None
    if frames > 1 and first_frame is not None:
        clean = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
        clean[:, : height * width] = send(first_frame, device)[:, None]
        levels = levels * ~clean  # (B, T)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if clean is None else ~clean
    positions = video_positions(frames, height, width, send(fps.float(), device), batch=batch, device=device)
    return StreamTask(add_noise(tokens, noise, levels), sigma, positions, velocity(tokens, noise), mask, clean)


def audio_task(
    clean: torch.Tensor,
    lengths: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    sample_weights: torch.Tensor | None = None,
) -> StreamTask:
    """The sound stream of clean tokens (B, T, C), of which the first `lengths` (B,) (CPU) of each sample are real."""
    batch, tokens, _ = clean.shape
    device = noise.device
    clean = send(clean, device, torch.float32)
    levels = send(sigma, device)[:, None]
    mask = torch.arange(tokens, device=device)[None] < send(lengths, device)[:, None]
    positions = audio_positions(tokens, batch=batch, device=device)
    if sample_weights is not None:
        sample_weights = send(sample_weights, device)
    noisy, target = add_noise(clean, noise, levels), velocity(clean, noise)
    valid = mask if bool((lengths != tokens).any()) else None
    return StreamTask(noisy, sigma, positions, target, mask, sample_weights=sample_weights, valid=valid)


def audio_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T, C * bins) of cached sound latents (B, C, T, bins)."""
    return patchify_audio(latents.float())


def batch_fps(batch: dict, count: int) -> torch.Tensor:
    """Frame rate of each sample (B,); 25 where the batch does not say."""
    fps = batch["latents"].get("fps")
    return torch.full((count,), DEFAULT_FPS) if fps is None else fps.float()


@dataclass(frozen=True)
class Text:
    """Text of a batch: video (B, S, Dv), audio (B, S, Da) or None, mask (B, S) integer or None when all ones."""

    video: torch.Tensor | None
    audio: torch.Tensor | None
    mask: torch.Tensor | None


def batch_text(batch: dict, dropped: torch.Tensor, blank: Text | None = None) -> Text:
    """The batch's text with the `dropped` (B,) samples' replaced by zeros, or by the blank prompt's embedding.

    Zeros keep one valid position: a softmax over nothing is undefined.
    """
    conditions = batch["conditions"]
    mask = conditions["prompt_attention_mask"].clone()
    embeds = {}
    for stream in ("video", "audio"):
        embed = conditions.get(f"{stream}_prompt_embeds")
        if embed is not None and dropped.any():
            embed = embed.clone()
            replacement = getattr(blank, stream) if blank else None
            embed[dropped] = 0 if replacement is None else replacement.to(embed.dtype)
        embeds[stream] = embed
    if dropped.any():
        mask[dropped] = 0
        mask[dropped, 0] = 1
        if blank is not None:
            mask[dropped] = blank.mask.to(mask.dtype)
    return Text(embeds["video"], embeds["audio"], None if bool(mask.bool().all()) else mask)


def require_audio_text(text: Text, batch: dict, mode: str) -> torch.Tensor:
    """The audio text embedding (B, S, Da).

    Raises:
        UserError: the text caches hold none.
    """
    if text.audio is None:
        raise UserError(
            f"the text caches of {batch['item_keys'][0]} were made with --ltx2_mode video; "
            f"re-run ltx2_cache_text_encoder_outputs.py --ltx2_mode {mode}"
        )
    return text.audio
