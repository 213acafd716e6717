"""Latent upsamplers reproduce the golden latents."""

from __future__ import annotations

import torch
from safetensors import safe_open

from ltx2_tuner.models.upsampler import LatentUpsampler, UpsamplerConfig, upsample_latents
from ltx2_tuner.models.vae_layers import PerChannelStatistics
from tests.golden.cases import Case, assert_close, checkpoint_path, golden, read_config, read_weights

TOLERANCE = 5e-5


@golden("upsampler/*")
def test_upsampler(case: Case) -> None:
    folder, name = case.name.split("/")
    path = case.directory / folder / f"tiny_{name}.safetensors"
    config = UpsamplerConfig.from_dict(read_config(path))
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert UpsamplerConfig.from_shapes(shapes) == config

    upsampler = LatentUpsampler(config).eval()
    upsampler.load_state_dict(read_weights(path, ""))
    with torch.no_grad():
        assert_close(upsampler(case.inputs["latent"]), case.outputs["raw"], TOLERANCE, "raw")

    checkpoint = checkpoint_path(case.directory, "20")
    statistics = PerChannelStatistics(config.channels)
    loaded = statistics.load_state_dict(read_weights(checkpoint, "vae.per_channel_statistics."), strict=False)
    assert not loaded.missing_keys
    upsampled = upsample_latents(upsampler, case.inputs["latent"], statistics)
    assert_close(upsampled, case.outputs["latent"], TOLERANCE, "latent")
