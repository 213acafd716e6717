"""Sizes and configuration of the latent upsamplers."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.models.upsampler import LatentUpsampler, UpsamplerConfig


def make(**changes) -> LatentUpsampler:
    torch.manual_seed(0)
    config = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1, **changes}
    return LatentUpsampler(UpsamplerConfig.from_dict(config)).eval()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (3, 10, 6)),
        ({"rational_resampler": True}, (3, 10, 6)),
        ({"rational_resampler": True, "spatial_scale": 1.5}, (3, 8, 5)),
        ({"rational_resampler": True, "spatial_scale": 4.0}, (3, 20, 12)),
        ({"rational_resampler": True, "spatial_scale": 0.75}, (3, 4, 3)),
        ({"spatial_upsample": False, "temporal_upsample": True}, (5, 5, 3)),
    ],
)
def test_sizes(changes, size) -> None:
    upsampler = make(**changes)
    with torch.no_grad():
        out = upsampler(torch.randn(2, 4, 3, 5, 3))
    assert out.shape == (2, 4, *size) and out.isfinite().all()
    assert ("upsampler.blur_down.kernel" in upsampler.state_dict()) == changes.get("rational_resampler", False)


@pytest.mark.parametrize(
    ("changes", "entries", "parameters"),
    [
        ({}, 72, 497_867_904),
        ({"rational_resampler": True, "spatial_scale": 1.5}, 73, 545_058_944),
    ],
)
def test_released_sizes(changes, entries, parameters) -> None:
    with torch.device("meta"):
        upsampler = LatentUpsampler(UpsamplerConfig.from_dict({"mid_channels": 1024, **changes}))
    assert len(upsampler.state_dict()) == entries
    assert sum(parameter.numel() for parameter in upsampler.parameters()) == parameters
    shapes = {name: tuple(value.shape) for name, value in upsampler.state_dict().items()}
    assert UpsamplerConfig.from_shapes(shapes) == upsampler.config


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"dims": 2}, "dims"),
        ({"temporal_upsample": True}, "temporal_upsample"),
        ({"spatial_scale": 3.0, "rational_resampler": True}, "3.0"),
        ({"spatial_scale": 1.5}, "1.5"),
    ],
)
def test_a_config_it_cannot_follow_is_refused(config, named) -> None:
    with pytest.raises(ValueError, match=named):
        UpsamplerConfig.from_dict(config)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({}, "initial_conv"),
        ({"initial_conv.weight": (32, 4, 3, 3, 3)}, "upsampler.0"),
        ({"initial_conv.weight": (32, 4, 3, 3, 3), "upsampler.conv.weight": (160, 32, 3, 3)}, "5 sub-pixels"),
    ],
)
def test_shapes_of_something_else_are_refused(shapes, named) -> None:
    with pytest.raises(ValueError, match=named):
        UpsamplerConfig.from_shapes(shapes)


def test_output_has_the_dtype_of_the_latents() -> None:
    assert make().bfloat16()(torch.randn(1, 4, 1, 4, 4)).dtype == torch.float32
