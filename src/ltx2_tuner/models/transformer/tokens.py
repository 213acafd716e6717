"""Latents to token sequences and back, and the extent of each token in seconds and pixels.

B batch, C channels, F/H/W latent frames, height, width, T tokens. Positions are float32 and (B, axes, T, 2): start and
end of each token; the axes are time (seconds), height and width (pixels) for video, time alone for audio.
"""

from __future__ import annotations

import torch
from torch import Tensor

AUDIO_SAMPLE_RATE = 16000  # Hz
AUDIO_HOP = 160  # samples per mel frame
AUDIO_DOWNSAMPLE = 4  # mel frames per latent frame
AUDIO_LATENTS_PER_SECOND = AUDIO_SAMPLE_RATE / AUDIO_HOP / AUDIO_DOWNSAMPLE  # 25
SECONDS_PER_AUDIO_LATENT = 1 / AUDIO_LATENTS_PER_SECOND  # 0.04


def patchify_video(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, F*H*W, C), frame-major, then rows, then columns."""
    return latents.flatten(2).transpose(1, 2)


def unpatchify_video(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """(B, F*H*W, C) -> (B, C, F, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


def patchify_audio(latents: Tensor) -> Tensor:
    """(B, C, T, M mel bins) -> (B, T, C*M), channel-major features."""
    return latents.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens: Tensor, channels: int, bins: int) -> Tensor:
    """(B, T, C*M) -> (B, C, T, M)."""
    return tokens.unflatten(2, (channels, bins)).transpose(1, 2)


def video_latent_frames(pixel_frames: int, temporal_scale: int = 8) -> int:
    """Latent frames of a clip: the first pixel frame makes one, then every 8 make one."""
    return (pixel_frames - 1) // temporal_scale + 1


def audio_latent_length(seconds: float) -> int:
    """Audio latents that belong to a video of this length (25 a second, rounded half to even)."""
    return round(seconds * AUDIO_LATENTS_PER_SECOND)


def video_positions(
    frames: int,
    height: int,
    width: int,
    fps: float | Tensor,
    *,
    batch: int = 1,
    spatial_scale: int = 32,
    temporal_scale: int = 8,
    downscale: int = 1,
    start_frame: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Extents of a grid of video tokens, (B, 3, F*H*W, 2).

    Args:
        frames: latent frames; height, width: latent rows and columns.
        fps: frames per second, one number or (B,).
        downscale: the grid is a reference at 1/downscale of the resolution; its heights and widths are stretched.
        start_frame: pixel frame that the grid begins at. At 0 the first latent frame spans one pixel frame; elsewhere
            a lone latent frame is a still image and spans one pixel frame, more frames span `temporal_scale` each.
    """
    float32 = {"dtype": torch.float32, "device": device}
    time = _bounds(frames, temporal_scale, **float32)
    if start_frame == 0:
        time = (time + 1 - temporal_scale).clamp(min=0)
    elif frames == 1:
        time = torch.tensor([[0.0, 1.0]], **float32)
    time = time + start_frame
    rows = _bounds(height, spatial_scale * downscale, **float32)
    columns = _bounds(width, spatial_scale * downscale, **float32)
    grid = torch.stack(
        [
            time[:, None, None].expand(frames, height, width, 2),
            rows[None, :, None].expand(frames, height, width, 2),
            columns[None, None, :].expand(frames, height, width, 2),
        ]
    ).flatten(1, 3)  # (3, T, 2)
    rate = torch.as_tensor(fps, **float32).reshape(-1, 1, 1)
    positions = grid.expand(batch, -1, -1, -1).clone()
    positions[:, 0] /= rate
    return positions


def audio_positions(length: int, *, batch: int = 1, shift: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Extents of audio tokens `shift`, `shift + 1`, ... in seconds, (B, 1, T, 2)."""
    edges = torch.arange(shift, shift + length + 1, dtype=torch.float32, device=device) * AUDIO_DOWNSAMPLE
    edges = (edges + 1 - AUDIO_DOWNSAMPLE).clamp(min=0) * AUDIO_HOP / AUDIO_SAMPLE_RATE
    return torch.stack([edges[:-1], edges[1:]], dim=-1).expand(batch, 1, length, 2).clone()


def _bounds(count: int, scale: int, *, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Start and end of `count` cells of size `scale`, (count, 2)."""
    starts = torch.arange(count, dtype=dtype, device=device)
    return torch.stack([starts, starts + 1], dim=-1) * scale
