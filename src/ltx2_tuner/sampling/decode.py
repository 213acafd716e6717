"""From latent tokens to frames and sound."""

from __future__ import annotations

import torch

from ltx2_tuner.models import audio_vae
from ltx2_tuner.models.video_vae import tiling


@torch.no_grad()
def decode_frames(
    decoder: torch.nn.Module, latents: torch.Tensor, tiles: tiling.TileConfig | None = None
) -> torch.Tensor:
    """Frames of normalised video latents.

    Args:
        decoder: a `VideoDecoder` on the device and in the dtype to decode with.
        latents: (1, C, F, H, W).

    Returns:
        (N, height, width, 3) uint8 on the CPU.

    Raises:
        ArithmeticError: the decoder produced values that are no numbers.
    """
    parameter = next(decoder.parameters())
    pixels = tiling.decode(decoder, latents.to(parameter.device, parameter.dtype), tiles)
    if not pixels.isfinite().all():
        raise ArithmeticError("the decoded frames hold values that are not finite")
    frames = (pixels[0].float() / 2 + 0.5).clamp(0, 1)
    return (frames * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


@torch.no_grad()
def decode_waveform(decoder: torch.nn.Module, vocoder: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Sound of normalised audio latents (1, C, T, bins): (2, samples) float32 in [-1, 1] on the CPU.

    The vocoder always runs in float32; bfloat16 degrades its bandwidth extension audibly.
    """
    parameter = next(decoder.parameters())
    waveform = audio_vae.decode_waveform(decoder, vocoder, latents.to(parameter.device, parameter.dtype))
    if not waveform.isfinite().all():
        raise ArithmeticError("the decoded sound holds values that are not finite")
    return waveform[0].float().clamp(-1, 1).cpu()


def looks_empty(frames: torch.Tensor) -> bool:
    """Whether decoded frames are one flat colour: the sign of a broken adapter or checkpoint.

    Args:
        frames: (N, height, width, 3) uint8.
    """
    return bool(frames.float().std() < 1.0)
