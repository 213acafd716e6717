"""The video decoder: normalised latents back to pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.vae_layers import PerChannelStatistics
from ltx2_tuner.models.video_vae.config import BlockSpec, VideoVAEConfig
from ltx2_tuner.models.video_vae.layers import (
    CausalConv3d,
    ResBlock,
    ResStage,
    TimestepEmbedder,
    Upsample,
    make_norm,
    unpatchify,
)

# What a timestep-conditioned decoder is told the noise of its input is, and how much noise is mixed in.
DECODE_TIMESTEP = 0.05
DECODE_NOISE_SCALE = 0.025


class VideoDecoder(nn.Module):
    """Normalised latents (B, C, F, h, w) -> pixels (B, 3, 8(F-1)+1, 32h, 32w), nominally in [-1, 1], not clamped.

    Parameters are named as in a checkpoint below `vae.decoder.`, plus `per_channel_statistics.*`.
    """

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        if not config.decoder_blocks:
            raise ValueError("vae.decoder_blocks is empty: this checkpoint has no convolutional video decoder")
        self.config = config
        padding = config.decoder_padding
        channels = config.decoder_base_channels * math.prod(spec.multiplier for spec in config.decoder_blocks)
        self.conv_in = CausalConv3d(config.latent_channels, channels, padding_mode=padding)
        self.up_blocks = nn.ModuleList()
        for spec in reversed(config.decoder_blocks):
            block, channels = _up_block(spec, channels, config)
            self.up_blocks.append(block)
        self.conv_norm_out = make_norm(config.norm_layer, channels)
        self.conv_out = CausalConv3d(channels, config.out_channels * config.patch_size**2, padding_mode=padding)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)
        if config.timestep_conditioning:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.last_time_embedder = TimestepEmbedder(2 * channels)
            self.last_scale_shift_table = nn.Parameter(torch.zeros(2, channels))

    def forward(
        self,
        latents: Tensor,
        *,
        timestep: float = DECODE_TIMESTEP,
        noise_scale: float = DECODE_NOISE_SCALE,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, C, F, h, w) -> (B, 3, N, H, W) in the dtype of `latents`.

        The keywords matter to decoders with timestep conditioning or noise injection alone (no released file).
        """
        causal = self.config.causal_decoder
        x = latents.to(self.conv_in.conv.weight.dtype)
        timesteps = None
        if self.config.timestep_conditioning:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = noise * noise_scale + x * (1 - noise_scale)
            timesteps = torch.full((x.shape[0],), timestep, device=x.device) * self.timestep_scale_multiplier
        x = self.conv_in(self.per_channel_statistics.denormalise(x), causal)
        for block in self.up_blocks:
            x = block(x, causal, timesteps, generator) if isinstance(block, ResStage) else block(x, causal)
        x = self.conv_norm_out(x)
        if timesteps is not None:
            table = self.last_time_embedder(timesteps).unflatten(-1, (2, -1)) + self.last_scale_shift_table
            shift, scale = table[..., None, None, None].unbind(dim=1)  # (B, C, 1, 1, 1)
            x = x * (1 + scale) + shift
        x = self.conv_out(F.silu(x, inplace=True), causal)
        return unpatchify(x, self.config.patch_size).to(latents.dtype)


def _up_block(spec: BlockSpec, channels: int, config: VideoVAEConfig) -> tuple[nn.Module, int]:
    """The module of a decoder block list's entry and its output width."""
    options = {"norm": config.norm_layer, "padding_mode": config.decoder_padding, "inject_noise": spec.inject_noise}
    if spec.name == "res_x":
        return ResStage(channels, spec.layers, modulated=config.timestep_conditioning, **options), channels
    out = channels // spec.multiplier
    if spec.name == "res_x_y":
        if config.timestep_conditioning:
            raise ValueError("vae.decoder_blocks has res_x_y together with timestep_conditioning, which is unknown")
        return ResBlock(channels, out, **options), out
    upsample = Upsample(
        channels, spec.multiplier, spec.strides, residual=spec.residual, padding_mode=config.decoder_padding
    )
    return upsample, out
