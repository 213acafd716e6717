"""The video encoder: pixels to normalised latents, deterministic and causal in time."""

from __future__ import annotations

import logging

from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.vae_layers import PerChannelStatistics
from ltx2_tuner.models.video_vae.config import BlockSpec, VideoVAEConfig
from ltx2_tuner.models.video_vae.layers import CausalConv3d, ResBlock, ResidualDownsample, ResStage, make_norm, patchify

logger = logging.getLogger(__name__)


class VideoEncoder(nn.Module):
    """Pixels (B, 3, N, H, W) in [-1, 1] -> normalised mean latents (B, C, F, h, w), F = 1 + (N - 1) / 8.

    The latent is the mean of the posterior; nothing is ever sampled. Latent frame 0 depends on pixel frame 0 alone.
    Frames past the last 8n+1 are dropped with a warning. Parameters are named as in a checkpoint below
    `vae.encoder.`, plus `per_channel_statistics.*`.
    """

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        if not config.encoder_blocks:
            raise ValueError("vae.encoder_blocks is empty, so there is no video encoder to build")
        self.config = config
        padding = config.encoder_padding
        channels = config.latent_channels
        self.conv_in = CausalConv3d(config.in_channels * config.patch_size**2, channels, padding_mode=padding)
        self.down_blocks = nn.ModuleList()
        for spec in config.encoder_blocks:
            block, channels = _down_block(spec, channels, config)
            self.down_blocks.append(block)
        extra = config.latent_channels if config.latent_log_var == "per_channel" else 1
        self.conv_norm_out = make_norm(config.norm_layer, channels)
        self.conv_out = CausalConv3d(channels, config.latent_channels + extra, padding_mode=padding)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, N, H, W) in [-1, 1] -> (B, C, F, h, w) in the dtype of the weights."""
        self.config.latent_shape(pixels.shape[2:])  # refuses sizes that do not divide
        pixels = drop_incomplete(pixels, self.config.temporal_scale)
        x = patchify(pixels.to(self.conv_in.conv.weight.dtype), self.config.patch_size)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))
        mean = x[:, : self.config.latent_channels]
        return self.per_channel_statistics.normalise(mean).contiguous()


def drop_incomplete(pixels: Tensor, temporal_scale: int) -> Tensor:
    """(B, 3, N, H, W) without the frames after the last n*scale + 1, which would not fill a latent; warns."""
    extra = (pixels.shape[2] - 1) % temporal_scale
    if not extra:
        return pixels
    logger.warning(
        "%d frames are not a multiple of %d plus 1: the last %d are not encoded", pixels.shape[2], temporal_scale, extra
    )
    return pixels[:, :, :-extra]


def _down_block(spec: BlockSpec, channels: int, config: VideoVAEConfig) -> tuple[nn.Module, int]:
    """The module of an encoder block list's entry and its output width."""
    padding = config.encoder_padding
    if spec.name == "res_x":
        return ResStage(channels, spec.layers, norm=config.norm_layer, padding_mode=padding), channels
    out = channels * spec.multiplier
    if spec.name == "res_x_y":
        return ResBlock(channels, out, norm=config.norm_layer, padding_mode=padding), out
    if spec.name.endswith("_res"):
        return ResidualDownsample(channels, spec.multiplier, spec.strides, padding), out
    out = out if spec.name == "compress_all_x_y" else channels
    return CausalConv3d(channels, out, stride=spec.strides, padding_mode=padding), out
