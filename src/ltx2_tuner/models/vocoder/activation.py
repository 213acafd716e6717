"""Snake activations between upsampling and downsampling, so that their harmonics do not alias.

Legend: B batch, C channels, L samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATIO = 2
TAPS = 12


def kaiser_sinc(taps: int, ratio: int) -> Tensor:
    """Low-pass filter (1, 1, taps) of unit sum that cuts at 1/ratio of the band, Kaiser-windowed."""
    cutoff, half_width = 0.5 / ratio, 0.6 / ratio
    attenuation = 2.285 * (taps / 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    window = torch.kaiser_window(taps, periodic=False, beta=beta)
    times = torch.arange(taps) - taps // 2 + (0.5 if taps % 2 == 0 else 0)
    response = 2 * cutoff * window * torch.sinc(2 * cutoff * times)
    return (response / response.sum()).view(1, 1, -1)


def _each_channel(x: Tensor, pad: tuple[int, int]) -> Tensor:
    """(B, C, L) -> (B*C, 1, L + pads), the ends repeated: one filter then serves all channels."""
    return F.pad(x, pad, mode="replicate").flatten(0, 1).unsqueeze(1)


class UpSample(nn.Module):
    """(B, C, L) -> (B, C, 2L)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc(TAPS, RATIO))

    def forward(self, x: Tensor) -> Tensor:
        taps = self.filter.shape[-1]
        pad = taps // RATIO - 1
        left, right = pad * RATIO + (taps - RATIO) // 2, pad * RATIO + (taps - RATIO + 1) // 2
        y = RATIO * F.conv_transpose1d(_each_channel(x, (pad, pad)), self.filter, stride=RATIO)
        return y[..., left : y.shape[-1] - right].unflatten(0, x.shape[:2]).squeeze(2)


class LowPass(nn.Module):
    """(B, C, 2L) -> (B, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc(TAPS, RATIO))

    def forward(self, x: Tensor) -> Tensor:
        taps = self.filter.shape[-1]
        padded = _each_channel(x, ((taps - 1) // 2, taps // 2))
        return F.conv1d(padded, self.filter, stride=RATIO).unflatten(0, x.shape[:2]).squeeze(2)


class DownSample(nn.Module):
    """`LowPass` under the name the checkpoint gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        return self.lowpass(x)


class Snake(nn.Module):
    """`x + sin^2(x * e^alpha) / e^beta` with a frequency and, for snakebeta, an amplitude of its own per channel."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        if kind == "snakebeta":
            self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same shape."""
        alpha = self.alpha.exp()[:, None]
        beta = self.beta.exp()[:, None] if hasattr(self, "beta") else alpha
        return x + (x * alpha).sin().square() / (beta + 1e-9)


class AntiAliasedSnake(nn.Module):
    """A snake applied at twice the rate."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.act = Snake(channels, kind)
        self.upsample = UpSample()
        self.downsample = DownSample()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same shape."""
        return self.downsample(self.act(self.upsample(x)))
