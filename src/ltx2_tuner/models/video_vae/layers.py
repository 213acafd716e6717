"""Building blocks of the video autoencoder.

Legend: B batch, C channels, T frames, H/W height and width of the activation at hand. Tensors are (B, C, T, H, W),
kept in channels-last memory, which is what fast 3-D convolution kernels and the fused norm read.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.vae_layers import PixelNorm

PIXEL_NORM_EPS = 1e-8
SINUSOID_WIDTH = 256


class CausalConv3d(nn.Module):
    """Convolution whose time axis is padded by repeating edge frames; the spatial padding is the convolution's own.

    Causal: only past frames are padded, so an output frame sees no later input frame. With `chunk_size` set,
    the time axis is worked off in windows of that many input frames: same result, smaller workspace.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride, (0, 1, 1), padding_mode=padding_mode)
        self.chunk_size: int | None = None

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', ceil(T / stride), ...)."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        before = kernel - 1 if causal else (kernel - 1) // 2
        after = 0 if causal else (kernel - 1) // 2
        frames = (x.shape[2] + before + after - kernel) // stride + 1
        step = frames if self.chunk_size is None else max(self.chunk_size // stride, 1)

        output = None
        for start in range(0, frames, step):
            stop = min(start + step, frames)
            chunk = self.conv(take_frames(x, start * stride - before, (stop - 1) * stride + kernel - before))
            if stop - start == frames:
                return chunk
            if output is None:
                shape = (chunk.shape[0], chunk.shape[1], frames, *chunk.shape[3:])
                output = torch.empty(shape, dtype=chunk.dtype, device=chunk.device, memory_format=_memory_format(chunk))
            output[:, :, start:stop] = chunk
        return output


def _memory_format(x: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def take_frames(x: Tensor, start: int, stop: int) -> Tensor:
    """Frames [start, stop) of (B, C, T, H, W); positions before 0 repeat the first frame, past T the last."""
    total = x.shape[2]
    moved = x.movedim(1, -1)  # (B, T, H, W, C)
    parts = [moved[:, max(start, 0) : min(stop, total)]]
    if start < 0:
        parts.insert(0, moved[:, :1].expand(-1, -start, -1, -1, -1))
    if stop > total:
        parts.append(moved[:, -1:].expand(-1, stop - total, -1, -1, -1))
    taken = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return taken.movedim(-1, 1)


def space_to_depth(x: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """(B, C, T*s1, H*s2, W*s3) -> (B, C*s1*s2*s3, T, H, W), old channel slowest."""
    pattern = "b c (t s1) (h s2) (w s3) -> b t h w (c s1 s2 s3)"
    return rearrange(x, pattern, s1=strides[0], s2=strides[1], s3=strides[2]).movedim(-1, 1)


def depth_to_space(x: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """Inverse of `space_to_depth`."""
    pattern = "b (c s1 s2 s3) t h w -> b (t s1) (h s2) (w s3) c"
    return rearrange(x, pattern, s1=strides[0], s2=strides[1], s3=strides[2]).movedim(-1, 1)


def patchify(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, T, H*size, W*size) -> (B, 3*size*size, T, H, W); in a patch, the column is slower than the row."""
    return rearrange(pixels, "b c t (h q) (w r) -> b t h w (c r q)", q=size, r=size).movedim(-1, 1)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """Inverse of `patchify`."""
    return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=size, r=size)


def make_norm(kind: str, channels: int) -> nn.Module:
    """`kind` is pixel_norm or group_norm (32 groups)."""
    return PixelNorm(PIXEL_NORM_EPS) if kind == "pixel_norm" else nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions around a residual connection, optionally modulated by a timestep and fed with noise."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: str,
        padding_mode: str,
        modulated: bool = False,
        inject_noise: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, padding_mode=padding_mode)
        self.norm2 = make_norm(norm, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, padding_mode=padding_mode)
        if in_channels != out_channels:
            self.norm3 = nn.GroupNorm(1, in_channels, eps=1e-6)
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)
        if modulated:
            self.scale_shift_table = nn.Parameter(torch.zeros(4, in_channels))
        self.inject_noise = inject_noise
        if inject_noise:
            self.per_channel_scale1 = nn.Parameter(torch.zeros(out_channels, 1, 1))
            self.per_channel_scale2 = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def forward(
        self,
        x: Tensor,
        causal: bool = True,
        modulation: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W); `modulation` (B, 4, C) are two pairs of shift and scale."""
        h = self.norm1(x)
        if modulation is not None:
            table = (modulation + self.scale_shift_table)[..., None, None, None]  # (B, 4, C, 1, 1, 1)
            shift1, scale1, shift2, scale2 = table.unbind(dim=1)
            h = h * (1 + scale1) + shift1
        h = self.conv1(F.silu(h, inplace=True), causal)
        if self.inject_noise:
            h = h + _noise_plane(h, generator) * self.per_channel_scale1[:, None]
        h = self.norm2(h)
        if modulation is not None:
            h = h * (1 + scale2) + shift2
        h = self.conv2(F.silu(h, inplace=True), causal)
        if self.inject_noise:
            h = h + _noise_plane(h, generator) * self.per_channel_scale2[:, None]
        shortcut = self.conv_shortcut(self.norm3(x)) if hasattr(self, "conv_shortcut") else x
        return h.add_(shortcut)


def _noise_plane(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """One (H, W) plane of noise, shared by batch, channels and time."""
    return torch.randn(x.shape[-2:], generator=generator, device=x.device, dtype=x.dtype)


class TimestepMLP(nn.Module):
    """Scaled timesteps (B,) -> sinusoids (B, 256) -> two linear layers -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_WIDTH, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = SINUSOID_WIDTH // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class TimestepEmbedder(nn.Module):
    """`TimestepMLP` under the name the checkpoint gives it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMLP(width)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.timestep_embedder(timesteps)


class ResStage(nn.Module):
    """Residual blocks of one width, all modulated by one embedding of the timestep where the decoder takes one."""

    def __init__(
        self,
        channels: int,
        layers: int,
        *,
        norm: str,
        padding_mode: str,
        modulated: bool = False,
        inject_noise: bool = False,
    ) -> None:
        super().__init__()
        if modulated:
            self.time_embedder = TimestepEmbedder(4 * channels)
        options = {"norm": norm, "padding_mode": padding_mode, "modulated": modulated, "inject_noise": inject_noise}
        self.res_blocks = nn.ModuleList(ResBlock(channels, channels, **options) for _ in range(layers))

    def forward(
        self,
        x: Tensor,
        causal: bool = True,
        timesteps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, C, T, H, W) -> the same shape; `timesteps` (B,) already scaled."""
        modulation = None
        if timesteps is not None:
            modulation = self.time_embedder(timesteps).unflatten(-1, (4, -1))  # (B, 4, C)
        for block in self.res_blocks:
            x = block(x, causal, modulation, generator)
        return x


class ResidualDownsample(nn.Module):
    """Space to depth of a convolution, plus the input's own space to depth averaged to the same width."""

    def __init__(self, in_channels: int, multiplier: int, strides: tuple[int, int, int], padding_mode: str) -> None:
        super().__init__()
        self.strides = strides
        self.out_channels = in_channels * multiplier
        cells = strides[0] * strides[1] * strides[2]
        self.conv = CausalConv3d(in_channels, self.out_channels // cells, padding_mode=padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C*multiplier, ceil(T / s1), H / s2, W / s3)."""
        if self.strides[0] == 2:
            x = take_frames(x, -1, x.shape[2])
        y = space_to_depth(self.conv(x), self.strides)
        skip = space_to_depth(x, self.strides)
        return y.add_(skip.movedim(1, -1).unflatten(-1, (self.out_channels, -1)).mean(dim=-1).movedim(-1, 1))


class Upsample(nn.Module):
    """Depth to space of a convolution, optionally plus the input's own, its channels tiled to the same width."""

    def __init__(
        self, in_channels: int, reduction: int, strides: tuple[int, int, int], *, residual: bool, padding_mode: str
    ) -> None:
        super().__init__()
        self.strides = strides
        self.residual = residual
        cells = strides[0] * strides[1] * strides[2]
        self.repeats = cells // reduction
        self.conv = CausalConv3d(in_channels, cells * in_channels // reduction, padding_mode=padding_mode)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, C, T, H, W) -> (B, C / reduction, s1*T - (s1 - 1), s2*H, s3*W)."""
        # Upsampling in time doubles the first frame too, which stands for a single one: it is dropped.
        first = self.strides[0] - 1
        y = depth_to_space(self.conv(x, causal), self.strides)[:, :, first:]
        if self.residual:
            y.add_(depth_to_space(x, self.strides).repeat(1, self.repeats, 1, 1, 1)[:, :, first:])
        return y
