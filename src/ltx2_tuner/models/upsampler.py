"""Latent upsamplers: small networks between the two stages of sampling, from files of their own.

Legend: B batch, C latent channels, F/H/W latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.vae_layers import PerChannelStatistics

GROUPS = 32
SCALES = (0.75, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class UpsamplerConfig:
    """Sizes of an upsampler. `rational` resizes by `spatial_scale` = numerator / denominator, else it is 2."""

    channels: int = 128
    width: int = 512
    blocks: int = 4  # residual blocks before, and again after, the upsampling
    spatial: bool = True
    temporal: bool = False
    spatial_scale: float = 2.0
    rational: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UpsamplerConfig:
        """Read the flat `config` of an upsampler's file; ValueError names a key this model cannot follow."""
        if config.get("dims", 3) != 3:
            raise ValueError(f"upsampler dims is {config['dims']!r}; only 3 is known")
        made = cls(
            channels=config.get("in_channels", cls.channels),
            width=config.get("mid_channels", cls.width),
            blocks=config.get("num_blocks_per_stage", cls.blocks),
            spatial=config.get("spatial_upsample", cls.spatial),
            temporal=config.get("temporal_upsample", cls.temporal),
            spatial_scale=float(config.get("spatial_scale", cls.spatial_scale)),
            rational=config.get("rational_resampler", cls.rational),
        )
        if made.spatial == made.temporal:
            raise ValueError("upsampler spatial_upsample and temporal_upsample are equal; exactly one must be true")
        if made.spatial and made.spatial_scale not in (SCALES if made.rational else (2.0,)):
            raise ValueError(
                f"upsampler spatial_scale is {made.spatial_scale}, which rational_resampler does not allow"
            )
        return made

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> UpsamplerConfig:
        """The config of a file without metadata, from its tensor shapes."""
        if "initial_conv.weight" not in shapes:
            raise ValueError("no latent upsampler among the tensors: initial_conv.weight is missing")
        width, channels = shapes["initial_conv.weight"][:2]
        blocks = sum(key.startswith("res_blocks.") and key.endswith(".conv1.weight") for key in shapes)
        sizes = {"channels": channels, "width": width, "blocks": blocks}
        if "upsampler.conv.weight" in shapes:
            # 4 and 16 sub-pixels are whole steps, 9 are three to every two latents.
            factor = shapes["upsampler.conv.weight"][0] // width
            scale = {4: 2.0, 9: 1.5, 16: 4.0}.get(factor)
            if scale is None:
                raise ValueError(f"the latent upsampler makes {factor} sub-pixels, which no known scale does")
            return cls(**sizes, spatial_scale=scale, rational=True)
        if "upsampler.0.weight" not in shapes:
            raise ValueError("no latent upsampler among the tensors: neither upsampler.conv nor upsampler.0")
        temporal = len(shapes["upsampler.0.weight"]) == 5
        return cls(**sizes, spatial=not temporal, temporal=temporal)


class ResBlock(nn.Module):
    """Two convolutions with group norms; the activation follows the residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + x)


class PlainUpsampler(nn.Sequential):
    """(B, C, F, H, W) -> (B, C, F, 2H, 2W)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(width, 4 * width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        return rearrange(F.pixel_shuffle(self[0](frames), 2), "(b f) c h w -> b c f h w", b=x.shape[0])


class TemporalUpsampler(nn.Sequential):
    """(B, C, F, H, W) -> (B, C, 2F - 1, H, W): the first latent frame stands for one pixel frame and stays one."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv3d(width, 2 * width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self[0](x), "b (c p) f h w -> b c (f p) h w", p=2)[:, :, 1:]


class BlurDown(nn.Module):
    """Binomial blur of 5x5 that keeps every `stride`-th position; nothing to do for a stride of 1."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 256)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        if self.stride == 1:
            return x
        blurred = F.conv2d(x.flatten(0, 1).unsqueeze(1), self.kernel, stride=self.stride, padding=2)
        return blurred.unflatten(0, x.shape[:2]).squeeze(2)


class RationalUpsampler(nn.Module):
    """(B, C, F, H, W) -> (B, C, F, ceil(H * scale), ceil(W * scale)): up by the numerator, blurred and thinned."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.up, down = Fraction(scale).as_integer_ratio()
        self.conv = nn.Conv2d(width, self.up**2 * width, 3, padding=1)
        self.blur_down = BlurDown(down)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        resized = self.blur_down(F.pixel_shuffle(self.conv(frames), self.up))
        return rearrange(resized, "(b f) c h w -> b c f h w", b=x.shape[0])


class LatentUpsampler(nn.Module):
    """Un-normalised latents (B, C, F, H, W) -> un-normalised latents, larger in space or in time.

    `upsample_latents` takes and gives normalised ones. Parameters are named as in an upsampler's file.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.initial_conv = nn.Conv3d(config.channels, width, 3, padding=1)
        self.initial_norm = nn.GroupNorm(GROUPS, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.blocks))
        if config.temporal:
            self.upsampler = TemporalUpsampler(width)
        elif config.rational:
            self.upsampler = RationalUpsampler(width, config.spatial_scale)
        else:
            self.upsampler = PlainUpsampler(width)
        self.post_upsample_res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.blocks))
        self.final_conv = nn.Conv3d(width, config.channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, F, H, W) -> the same with H and W (or F) enlarged, in the dtype of `latents`."""
        x = F.silu(self.initial_norm(self.initial_conv(latents.to(self.initial_conv.weight.dtype))))
        for block in self.res_blocks:
            x = block(x)
        x = self.upsampler(x)
        for block in self.post_upsample_res_blocks:
            x = block(x)
        return self.final_conv(x).to(latents.dtype)


@torch.no_grad()
def upsample_latents(upsampler: LatentUpsampler, latents: Tensor, statistics: PerChannelStatistics) -> Tensor:
    """Normalised latents (B, C, F, H, W) -> normalised, enlarged ones; `statistics` are the video autoencoder's."""
    return statistics.normalise(upsampler(statistics.denormalise(latents)))
