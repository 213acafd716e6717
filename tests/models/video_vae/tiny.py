"""A video autoencoder of a few channels with the block lists of either generation."""

from __future__ import annotations

from typing import Any


def tiny_config(version: str) -> dict[str, Any]:
    """The `vae` section: 8 latent channels, one residual block a stage."""
    stage = ["res_x", {"num_layers": 1}]
    last, decoder = 2, ["compress_all", "compress_all", "compress_all"]
    options: list[dict[str, Any]] = [{"residual": True, "multiplier": 2}] * 3
    if version == "2.3":
        last, decoder = 1, ["compress_space", "compress_time", "compress_all", "compress_all"]
        options = [{"multiplier": 2}, {"multiplier": 2}, {"multiplier": 1}, {"multiplier": 2}]
    downs = ["compress_space_res", "compress_time_res", "compress_all_res", "compress_all_res"]
    encoder_blocks: list = [stage]
    for name, multiplier in zip(downs, (2, 2, 2, last)):
        encoder_blocks += [[name, {"multiplier": multiplier}], stage]
    decoder_blocks: list = [stage]
    for name, values in zip(decoder, options):
        decoder_blocks += [[name, values], stage]
    section = {
        "latent_channels": 8,
        "decoder_base_channels": 4,
        "encoder_blocks": encoder_blocks,
        "decoder_blocks": decoder_blocks,
    }
    return section if version == "2.0" else {**section, "spatial_padding_mode": "zeros"}
