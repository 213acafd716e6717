"""The waveform generator: transposed convolutions with residual blocks, of the plain and the anti-aliased kind.

Legend: B batch, C channels, L samples; mel spectrograms are (B, 2, frames, bins).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.vocoder.activation import AntiAliasedSnake
from ltx2_tuner.models.vocoder.base import Vocoder
from ltx2_tuner.models.vocoder.config import GeneratorConfig

SLOPE = 0.1
# The last activation of the plain generator keeps the framework's default slope; the weights were trained with it.
FINAL_SLOPE = 0.01


def _same_conv(channels: int, kernel: int, dilation: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


class ResBlock(nn.Module):
    """Residual pairs of convolutions, the first of each pair dilated."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_same_conv(channels, kernel, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same shape."""
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class AntiAliasedResBlock(ResBlock):
    """The same with an anti-aliased snake before each convolution."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], activation: str) -> None:
        super().__init__(channels, kernel, dilations)
        self.acts1 = nn.ModuleList(AntiAliasedSnake(channels, activation) for _ in dilations)
        self.acts2 = nn.ModuleList(AntiAliasedSnake(channels, activation) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same shape."""
        for act1, first, act2, second in zip(self.acts1, self.convs1, self.acts2, self.convs2):
            x = x + second(act2(first(act1(x))))
        return x


class Generator(Vocoder):
    """Log-mel (B, 2, frames, bins) -> waveform (B, 2, frames * samples_per_frame).

    Alone it is the vocoder of 2.0; the one of 2.3 is made of two.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.output_rate = config.output_rate
        width = config.initial_channels
        self.conv_pre = nn.Conv1d(config.channels * config.mel_bins, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(config.rates, config.kernels):
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            for res_kernel, dilations in zip(config.res_kernels, config.res_dilations):
                if config.anti_aliased:
                    block = AntiAliasedResBlock(width, res_kernel, dilations, config.activation)
                else:
                    block = ResBlock(width, res_kernel, dilations)
                self.resblocks.append(block)
        if config.anti_aliased:
            self.act_post = AntiAliasedSnake(width, config.activation)
        self.conv_post = nn.Conv1d(width, config.channels, 7, padding=3, bias=config.final_bias)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 2, frames, bins) -> (B, 2, frames * samples_per_frame) in the dtype of the weights."""
        with torch.autocast(mel.device.type, enabled=False):
            x = rearrange(mel.to(self.conv_pre.weight.dtype), "b s t m -> b (s m) t")
            x = self.conv_pre(x)
            parallel = len(self.config.res_kernels)
            for index, up in enumerate(self.ups):
                x = up(x if self.config.anti_aliased else F.leaky_relu(x, SLOPE))
                blocks = self.resblocks[index * parallel : (index + 1) * parallel]
                x = sum(block(x) for block in blocks) / parallel
            x = self.act_post(x) if self.config.anti_aliased else F.leaky_relu(x, FINAL_SLOPE)
            x = self.conv_post(x)
        if self.config.final == "tanh":
            return x.tanh()
        return x.clamp(-1, 1) if self.config.final == "clamp" else x
