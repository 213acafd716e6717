"""Latent upsamplers, which are files of their own, and the statistics of the latents they work on."""

from __future__ import annotations

import json
import os

import torch

from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.modules import CONFIG_ERRORS, assign, on_meta
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.upsampler import LatentUpsampler, UpsamplerConfig
from ltx2_tuner.models.vae_layers import PerChannelStatistics

_FLAG = "--spatial_upsampler_path"


def load_spatial_upsampler(path: str | os.PathLike, device: str | torch.device, dtype: torch.dtype) -> LatentUpsampler:
    """The frozen upsampler of a file, which doubles height and width.

    Raises:
        UserError: missing or damaged, no upsampler, or one of another scale.
    """
    with SafetensorsFile(path) as file:
        shapes = {name: entry.shape for name, entry in file.tensors.items()}
        try:
            config = _config(file.metadata.get("config"), shapes)
            with on_meta():
                upsampler = LatentUpsampler(config)
        except CONFIG_ERRORS as error:
            raise UserError(f"{path}: is no latent upsampler ({error}); give {_FLAG} another file") from error
        if not config.spatial or config.spatial_scale != 2:
            kind = f"spatial x{config.spatial_scale:g}" if config.spatial else "temporal"
            raise UserError(f"{path}: is a {kind} upsampler, two-stage sampling needs a spatial x2 one; change {_FLAG}")
        wanted = upsampler.state_dict()
        wrong = [key for key, tensor in wanted.items() if shapes.get(key) != tuple(tensor.shape)]
        if wrong:
            raise UserError(
                f"{path}: {len(wrong)} of the {len(wanted)} tensors of the upsampler are missing or of another shape, "
                f"such as {wrong[0]}; download the file again"
            )
        for key in wanted:
            assign(upsampler, key, file.read(key, device, dtype))
    return upsampler.requires_grad_(False).eval()


def _config(text: str | None, shapes: dict[str, tuple[int, ...]]) -> UpsamplerConfig:
    inferred = UpsamplerConfig.from_shapes(shapes)  # another model's file has a config, too, but not these tensors
    return inferred if text is None else UpsamplerConfig.from_dict(json.loads(text))


def load_latent_statistics(checkpoint: Checkpoint, device: str | torch.device) -> PerChannelStatistics:
    """Mean and deviation of each channel of the video latents, float32.

    Raises:
        UserError: the file has no video autoencoder.
    """
    found = checkpoint.component("video_decoder")
    names = {key: found.get(f"per_channel_statistics.{key}") for key in ("mean-of-means", "std-of-means")}
    if None in names.values():
        raise UserError(f"{checkpoint.path}: has no video latent statistics; name a file that has them with --vae")
    statistics = PerChannelStatistics(checkpoint.entry(names["mean-of-means"]).shape[0])
    for key, name in names.items():
        assign(statistics, key, checkpoint.read(name, device, torch.float32))
    return statistics
