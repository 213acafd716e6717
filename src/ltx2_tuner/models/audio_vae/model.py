"""The sound autoencoder: log-mel spectrograms to normalised latents and back.

Legend: B batch, C latent channels, T latents along time, M latent bins; mel spectrograms are (B, 2, frames, bins).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.audio_vae.config import AudioVAEConfig
from ltx2_tuner.models.audio_vae.layers import (
    PIXEL_NORM_EPS,
    CausalConv2d,
    Downsample,
    Level,
    Middle,
    Upsample,
)
from ltx2_tuner.models.vae_layers import PerChannelStatistics, PixelNorm


class AudioEncoder(nn.Module):
    """Log-mel (B, 2, frames, bins) -> normalised mean latents (B, C, T, M), T = ceil(frames / 4), M = bins / 4.

    Causal: latent i depends on mel frames up to 4i. Parameters are named as in a checkpoint below
    `audio_vae.encoder.`, plus `per_channel_statistics.*`.
    """

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.conv_in = CausalConv2d(config.in_channels, width)
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            after = config.channels * multiplier
            self.down.append(Level([width] + [after] * config.res_blocks, config.has_attention(level)))
            width = after
            if level < len(config.channel_multipliers) - 1:
                self.down[level].downsample = Downsample(width)
        self.mid = Middle(width, config.mid_attention)
        self.norm_out = PixelNorm(PIXEL_NORM_EPS)
        self.conv_out = CausalConv2d(width, config.latent_channels * (2 if config.double_latent else 1))
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels * config.latent_bins)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 2, frames, bins) -> (B, C, T, M) in the dtype of the weights."""
        x = self.conv_in(mel.to(self.conv_in.conv.weight.dtype))
        for level in self.down:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        tokens = rearrange(x[:, : self.config.latent_channels], "b c t m -> b t (c m)")
        tokens = self.per_channel_statistics.normalise(tokens, dim=-1)
        return rearrange(tokens, "b t (c m) -> b c t m", c=self.config.latent_channels).contiguous()


class AudioDecoder(nn.Module):
    """Normalised latents (B, C, T, M) -> log-mel (B, 2, 4T - 3, 4M).

    Parameters are named as in a checkpoint below `audio_vae.decoder.`, plus `per_channel_statistics.*`.
    """

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels * config.channel_multipliers[-1]
        self.conv_in = CausalConv2d(config.latent_channels, width)
        self.mid = Middle(width, config.mid_attention)
        levels = []
        for level in reversed(range(len(config.channel_multipliers))):
            after = config.channels * config.channel_multipliers[level]
            module = Level([width] + [after] * (config.res_blocks + 1), config.has_attention(level))
            width = after
            if level > 0:
                module.upsample = Upsample(width)
            levels.append(module)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = PixelNorm(PIXEL_NORM_EPS)
        self.conv_out = CausalConv2d(width, config.out_channels)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels * config.latent_bins)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T, M) -> (B, 2, 4T - 3, 4M) in the dtype of `latents`."""
        x = latents.to(self.conv_in.conv.weight.dtype)
        tokens = self.per_channel_statistics.denormalise(rearrange(x, "b c t m -> b t (c m)"), dim=-1)
        x = self.conv_in(rearrange(tokens, "b t (c m) -> b c t m", c=self.config.latent_channels))
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x))).to(latents.dtype)
