"""Building blocks of the sound autoencoder.

Legend: B batch, C channels, T mel frames, M mel bins of the activation at hand. Tensors are (B, C, T, M); time is
causal, the mel axis is not.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.vae_layers import PixelNorm

PIXEL_NORM_EPS = 1e-6


class CausalConv2d(nn.Module):
    """Convolution of 3x3, or 1x1, that sees no later time: zeros before the first frame and around the mel axis."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, M) -> (B, C', T, M)."""
        pad = self.conv.kernel_size[0] - 1
        return self.conv(F.pad(x, (pad // 2, pad // 2, pad, 0)) if pad else x)


class ResBlock(nn.Module):
    """Two convolutions around a residual connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = PixelNorm(PIXEL_NORM_EPS)
        self.conv1 = CausalConv2d(in_channels, out_channels)
        self.norm2 = PixelNorm(PIXEL_NORM_EPS)
        self.conv2 = CausalConv2d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv2d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Attention of every position to every position, one head; no released file has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = PixelNorm(PIXEL_NORM_EPS)
        self.q = CausalConv2d(channels, channels, kernel=1)
        self.k = CausalConv2d(channels, channels, kernel=1)
        self.v = CausalConv2d(channels, channels, kernel=1)
        self.proj_out = CausalConv2d(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (projection(h).flatten(2).transpose(1, 2) for projection in (self.q, self.k, self.v))  # (B, T*M, C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves both axes: T -> ceil(T / 2), M -> M / 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """Doubles both axes and drops the first time row: T -> 2T - 1, M -> 2M."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))[:, :, 1:]


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the config has it, then resampling."""

    def __init__(self, widths: list[int], attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before, after) for before, after in pairwise(widths))
        self.attn = nn.ModuleList(Attention(width) for width in widths[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))
