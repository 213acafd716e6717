"""Configuration, causality and precision of the video autoencoder."""

from __future__ import annotations

import logging

import pytest
import torch

from ltx2_tuner.models.vae_layers import PixelNorm
from ltx2_tuner.models.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from ltx2_tuner.models.video_vae.layers import depth_to_space, patchify, space_to_depth, unpatchify
from tests.models.video_vae.tiny import tiny_config

# Sizes of the released checkpoints: block lists in file order.
RES = "res_x"
RELEASED = {
    "2.0": {
        "encoder_blocks": [
            [RES, 4], ["compress_space_res", {}], [RES, 6], ["compress_time_res", {}], [RES, 6],
            ["compress_all_res", {}], [RES, 2], ["compress_all_res", {}], [RES, 2],
        ],
        "decoder_blocks": [
            [RES, 5], ["compress_all", {"residual": True, "multiplier": 2}],
            [RES, 5], ["compress_all", {"residual": True, "multiplier": 2}],
            [RES, 5], ["compress_all", {"residual": True, "multiplier": 2}], [RES, 5],
        ],
    },
    "2.3": {
        "spatial_padding_mode": "zeros",
        "encoder_blocks": [
            [RES, 4], ["compress_space_res", {}], [RES, 6], ["compress_time_res", {}], [RES, 4],
            ["compress_all_res", {}], [RES, 2], ["compress_all_res", {"multiplier": 1}], [RES, 2],
        ],
        "decoder_blocks": [
            [RES, 4], ["compress_space", {"multiplier": 2}], [RES, 6], ["compress_time", {"multiplier": 2}], [RES, 4],
            ["compress_all", {"multiplier": 1}], [RES, 2], ["compress_all", {"multiplier": 2}], [RES, 2],
        ],
    },
}  # fmt: skip


def shapes_of(version: str) -> dict[str, tuple[int, ...]]:
    config = VideoVAEConfig.from_dict(RELEASED[version])
    shapes = {}
    with torch.device("meta"):
        for part, kind in (("encoder", VideoEncoder), ("decoder", VideoDecoder)):
            for name, value in kind(config).state_dict().items():
                prefix = "" if name.startswith("per_channel_statistics.") else f"{part}."
                shapes[f"vae.{prefix}{name}"] = tuple(value.shape)
    return shapes


@pytest.mark.parametrize(
    ("version", "kind", "entries", "parameters"),
    [
        ("2.0", VideoEncoder, 94, 694_098_881),
        ("2.3", VideoEncoder, 86, 318_936_897),
        ("2.0", VideoDecoder, 92, 528_380_720),
        ("2.3", VideoDecoder, 86, 407_169_072),
    ],
)
def test_released_sizes(version, kind, entries, parameters) -> None:
    with torch.device("meta"):
        model = kind(VideoVAEConfig.from_dict(RELEASED[version]))
    assert len(model.state_dict()) == entries
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_released_config_is_inferred_from_shapes(version) -> None:
    shapes = shapes_of(version)
    expected = VideoVAEConfig.from_dict(RELEASED[version])
    assert VideoVAEConfig.from_shapes(shapes) == expected
    bare = {name.removeprefix("vae."): shape for name, shape in shapes.items()}
    assert VideoVAEConfig.from_shapes(bare) == expected
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        half = VideoVAEConfig.from_shapes({name: shape for name, shape in shapes.items() if f"{other}." not in name})
        assert getattr(half, f"{part}_blocks") == getattr(expected, f"{part}_blocks")
        assert getattr(half, f"{part}_padding") == getattr(expected, f"{part}_padding")
        assert (half.spatial_scale, half.temporal_scale) == (32, 8)


def test_shapes_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="no video autoencoder"):
        VideoVAEConfig.from_shapes({"audio_vae.encoder.conv_in.conv.weight": (1,)})
    with pytest.raises(ValueError, match=r"encoder\.down_blocks\.0"):
        VideoVAEConfig.from_shapes({"encoder.down_blocks.7.conv.conv.weight": (1, 8, 3, 3, 3)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dims": 2}, "dims"),
        ({"norm_layer": "layer_norm"}, "norm_layer"),
        ({"latent_log_var": "none"}, "latent_log_var"),
        ({"spatial_padding_mode": "mirror"}, "mirror"),
        ({"encoder_blocks": [["swirl", {}]]}, "swirl"),
        ({"_class_name": "Other"}, "Other"),
    ],
)
def test_a_config_it_cannot_follow_is_refused(change, named) -> None:
    with pytest.raises(ValueError, match=named):
        VideoVAEConfig.from_dict({**tiny_config("2.0"), **change})


def test_a_diffusion_decoder_file_gives_an_encoder_only() -> None:
    section = tiny_config("2.3")
    nested = {"blocks": section["encoder_blocks"], "out_channels": 8, "spatial_padding_mode": "zeros", "patch_size": 4}
    config = VideoVAEConfig.from_dict({"_class_name": "CausalDiffusionVAE", "encoder": nested, "decoder": {}})
    assert config.encoder_blocks == VideoVAEConfig.from_dict(section).encoder_blocks
    assert VideoEncoder(config)(torch.zeros(1, 3, 1, 32, 32)).shape == (1, 8, 1, 1, 1)
    with pytest.raises(ValueError, match="decoder"):
        VideoDecoder(config)


def test_padding_modes_follow_the_file() -> None:
    older, newer = (VideoVAEConfig.from_dict(tiny_config(version)) for version in ("2.0", "2.3"))
    assert (older.encoder_padding, older.decoder_padding) == ("zeros", "reflect")
    assert (newer.encoder_padding, newer.decoder_padding) == ("zeros", "zeros")
    section = {**tiny_config("2.0"), "encoder_spatial_padding_mode": "reflect", "decoder_spatial_padding_mode": "zeros"}
    split = VideoVAEConfig.from_dict(section)
    assert (split.encoder_padding, split.decoder_padding) == ("reflect", "zeros")


def test_latent_shape() -> None:
    config = VideoVAEConfig.from_dict(tiny_config("2.3"))
    assert config.latent_shape((33, 512, 768)) == (8, 5, 16, 24)
    assert config.latent_shape((1, 32, 32)) == (8, 1, 1, 1)
    assert config.pixel_shape((5, 16, 24)) == (33, 512, 768)
    with pytest.raises(ValueError, match="500"):
        config.latent_shape((33, 500, 768))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_encoder_is_causal(version) -> None:
    torch.manual_seed(0)
    encoder = VideoEncoder(VideoVAEConfig.from_dict(tiny_config(version))).eval()
    pixels = torch.rand(2, 3, 25, 32, 64) * 2 - 1
    with torch.no_grad():
        whole = encoder(pixels)
        for latents in (1, 2, 3):
            part = encoder(pixels[:, :, : 8 * (latents - 1) + 1])
            torch.testing.assert_close(part, whole[:, :, :latents], atol=2e-5, rtol=0)


def test_frames_past_the_grid_are_dropped_with_a_warning(caplog) -> None:
    encoder = VideoEncoder(VideoVAEConfig.from_dict(tiny_config("2.3"))).eval()
    pixels = torch.rand(1, 3, 12, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(pixels), encoder(pixels[:, :, :9]))
    assert any(record.levelno == logging.WARNING and "12 frames" in record.message for record in caplog.records)


def test_a_causal_decoder_sees_no_future() -> None:
    torch.manual_seed(0)
    config = VideoVAEConfig.from_dict({**tiny_config("2.3"), "causal_decoder": True})
    decoder = VideoDecoder(config).eval()
    latents = torch.randn(1, 8, 3, 2, 2)
    with torch.no_grad():
        whole = decoder(latents)
        assert whole.shape == (1, 3, 17, 64, 64)
        torch.testing.assert_close(decoder(latents[:, :, :2]), whole[:, :, :9], atol=2e-5, rtol=0)


def test_timestep_conditioning_follows_the_weights(caplog) -> None:
    torch.manual_seed(0)
    section = tiny_config("2.0")
    section["decoder_blocks"] = [
        [name, {**options, "inject_noise": True}] for name, options in section["decoder_blocks"]
    ]
    plain = VideoVAEConfig.from_dict(section)
    config = plain.matched_to(["vae.decoder.last_time_embedder.timestep_embedder.linear_1.weight"])
    assert config.timestep_conditioning and "timestep_conditioning" in caplog.text
    assert config.matched_to(["decoder.last_time_embedder.timestep_embedder.linear_1.weight"]) == config

    decoder = VideoDecoder(config).eval()
    names = decoder.state_dict().keys()
    expected = {
        "timestep_scale_multiplier",
        "last_scale_shift_table",
        "last_time_embedder.timestep_embedder.linear_2.bias",
        "up_blocks.0.time_embedder.timestep_embedder.linear_1.weight",
        "up_blocks.0.res_blocks.0.scale_shift_table",
        "up_blocks.0.res_blocks.0.per_channel_scale2",
    }
    assert expected <= set(names)
    for parameter in decoder.parameters():
        parameter.data.add_(0.01)
    latents = torch.randn(1, 8, 2, 2, 2)

    def run(seed: int, **options) -> torch.Tensor:
        with torch.no_grad():
            return decoder(latents, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), run(0, timestep=0.5))
    assert not torch.equal(run(0), run(0, noise_scale=0.0))


def test_channel_changing_residual_blocks() -> None:
    torch.manual_seed(0)
    section = tiny_config("2.0")
    section["encoder_blocks"] = [["res_x_y", {}], ["compress_all_x_y", {}], ["compress_space", {}]]
    section["decoder_blocks"] = [["compress_space", {}], ["compress_all", {"multiplier": 2}], ["res_x_y", {}]]
    config = VideoVAEConfig.from_dict(section)
    assert (config.spatial_scale, config.temporal_scale) == (16, 2)
    encoder, decoder = VideoEncoder(config), VideoDecoder(config)
    assert {"down_blocks.0.norm3.weight", "down_blocks.0.conv_shortcut.weight"} <= encoder.state_dict().keys()
    pixels = torch.rand(1, 3, 3, 32, 32)
    assert decoder(encoder(pixels)).shape == pixels.shape


def test_group_norm_and_per_channel_variance() -> None:
    section = {**tiny_config("2.3"), "norm_layer": "group_norm", "latent_channels": 32, "latent_log_var": "per_channel"}
    encoder = VideoEncoder(VideoVAEConfig.from_dict(section))
    assert encoder.conv_out.conv.out_channels == 64
    assert "down_blocks.0.res_blocks.0.norm1.weight" in encoder.state_dict()
    assert encoder(torch.rand(1, 3, 9, 32, 32)).shape == (1, 32, 2, 1, 1)


def test_rearrangements() -> None:
    x = torch.arange(2 * 3 * 4 * 4 * 6.0).view(2, 3, 4, 4, 6)
    packed = space_to_depth(x, (2, 2, 3))
    assert packed.shape == (2, 36, 2, 2, 2)
    channel, offsets, cell = 2, (1, 0, 2), (1, 0, 1)
    index = ((channel * 2 + offsets[0]) * 2 + offsets[1]) * 3 + offsets[2]
    assert packed[1, index, 1, 0, 1] == x[1, channel, cell[0] * 2 + offsets[0], offsets[1], cell[2] * 3 + offsets[2]]
    assert torch.equal(depth_to_space(packed, (2, 2, 3)), x)
    pixels = torch.rand(1, 3, 2, 8, 8)
    patches = patchify(pixels, 4)
    row, column = 1, 3
    assert torch.equal(patches[:, (2 * 4 + column) * 4 + row], pixels[:, 2, :, row::4, column::4])
    assert torch.equal(unpatchify(patches, 4), pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixel_norm_computes_in_float32(dtype) -> None:
    # 300^2 overflows float16, and bfloat16 sums would lose the small channels.
    x = torch.randn(2, 64, 3, 2, 2).mul(300).to(dtype)
    exact = x.double() / (x.double().square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    y = PixelNorm(1e-8)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_close(dtype, tolerance) -> None:
    torch.manual_seed(0)
    config = VideoVAEConfig.from_dict(tiny_config("2.3"))
    encoder, decoder = VideoEncoder(config).eval(), VideoDecoder(config).eval()
    pixels = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = encoder(pixels)
        video = decoder(latents)
        half = encoder.to(dtype)(pixels)
        assert half.dtype == dtype
        assert (half.float() - latents).norm() < tolerance * latents.norm()
        half_video = decoder.to(dtype)(latents)
        assert half_video.dtype == torch.float32  # the caller's
        assert (half_video - video).norm() < tolerance * video.norm()


def test_an_encoder_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder_blocks"):
        VideoEncoder(VideoVAEConfig.from_dict({"decoder_blocks": [["res_x", 1]]}))
