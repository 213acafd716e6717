"""What tiled and chunked encoding and decoding promise, on a tiny random autoencoder."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from ltx2_tuner.models.video_vae.tiling import TileConfig, convolution_chunks, decode, decode_pieces, encode
from tests.models.video_vae.tiny import tiny_config


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def config(request: pytest.FixtureRequest) -> VideoVAEConfig:
    return VideoVAEConfig.from_dict(tiny_config(request.param))


@pytest.fixture(scope="module")
def encoder(config: VideoVAEConfig) -> VideoEncoder:
    torch.manual_seed(0)
    return VideoEncoder(config).eval()


@pytest.fixture(scope="module")
def decoder(config: VideoVAEConfig) -> VideoDecoder:
    torch.manual_seed(1)
    return VideoDecoder(config).eval()


def clip(frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames + height + width)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


class IndexEncoder(nn.Module):
    """Gives each latent the coordinates of the pixel block it stands for, read from the pixels themselves."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Module()
        self.conv_in.conv = nn.Conv3d(1, 1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :, ::8, ::32, ::32].repeat(1, 3, 1, 1, 1)[:, : self.config.latent_channels]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8, 16])
def test_chunks_change_nothing(encoder, decoder, chunk_size) -> None:
    pixels, latents = clip(17, 64, 64, batch=2), torch.randn(2, 8, 3, 2, 2)
    tiles = TileConfig(chunk_size=chunk_size)
    torch.testing.assert_close(encode(encoder, pixels, tiles), encode(encoder, pixels), atol=2e-5, rtol=0)
    torch.testing.assert_close(decode(decoder, latents, tiles), decode(decoder, latents), atol=2e-5, rtol=0)


def test_chunks_bound_what_a_convolution_sees_and_are_undone(encoder) -> None:
    seen = []
    handle = encoder.conv_in.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    try:
        encode(encoder, clip(17, 64, 64), TileConfig(chunk_size=4))
        assert max(seen) == 4 + 2
        seen.clear()
        encode(encoder, clip(17, 64, 64))
        assert seen == [17 + 2]
    finally:
        handle.remove()


def test_chunks_align_with_strides() -> None:
    config = VideoVAEConfig.from_dict(
        {**tiny_config("2.0"), "encoder_blocks": [["res_x", 1], ["compress_all", {}], ["compress_time", {}]]}
    )
    torch.manual_seed(0)
    encoder = VideoEncoder(config).eval()
    pixels = clip(17, 32, 32)
    whole = encode(encoder, pixels)
    assert whole.shape[2:] == (5, 4, 4)
    for chunk_size in (1, 3, 4):
        torch.testing.assert_close(encode(encoder, pixels, TileConfig(chunk_size=chunk_size)), whole, atol=2e-5, rtol=0)


def test_one_tile_is_the_untiled_result(encoder, decoder) -> None:
    pixels, latents = clip(17, 64, 96), torch.randn(1, 8, 2, 2, 3)
    tiles = TileConfig(spatial_size=96, spatial_overlap=64, temporal_size=24, temporal_overlap=16)
    with torch.no_grad():
        assert torch.equal(encode(encoder, pixels, tiles), encoder(pixels))
        assert torch.equal(decode(decoder, latents, tiles), decoder(latents))


def test_tiles_put_each_latent_where_it_belongs(config) -> None:
    axes = torch.meshgrid(torch.arange(57.0), torch.arange(224.0), torch.arange(256.0), indexing="ij")
    pixels = torch.stack(axes)[None]
    tiles = TileConfig(spatial_size=128, spatial_overlap=64, temporal_size=24, temporal_overlap=16)
    expected = IndexEncoder(config)(pixels)
    assert torch.equal(encode(IndexEncoder(config), pixels, tiles), expected)


def test_first_temporal_tile_is_exact(encoder) -> None:
    pixels = clip(41, 32, 32)
    tiled = encode(encoder, pixels, TileConfig(temporal_size=24, temporal_overlap=16))
    whole = encode(encoder, pixels)
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled[:, :, :3], whole[:, :, :3], atol=2e-5, rtol=0)


def test_tiled_encoding_ignores_the_frames_that_fill_no_latent(encoder) -> None:
    pixels = clip(29, 32, 32)
    tiles = TileConfig(temporal_size=16, temporal_overlap=8)
    assert torch.equal(encode(encoder, pixels, tiles), encode(encoder, pixels[:, :, :25], tiles))


def test_tiled_decoding_joins_to_a_clip_near_the_untiled_one(decoder) -> None:
    latents = torch.randn(1, 8, 5, 4, 6)
    tiles = TileConfig.for_decoding(64, 32, 16, 8)
    pieces = list(decode_pieces(decoder, latents, tiles))
    tiled, whole = torch.cat(pieces, dim=2), decode(decoder, latents)
    assert len(pieces) > 1 and torch.equal(tiled, decode(decoder, latents, tiles))
    assert tiled.shape == whole.shape == (1, 3, 33, 128, 192)
    assert tiled.isfinite().all()
    assert not torch.equal(tiled, whole)


class ConstantDecoder(nn.Module):
    """Paints each latent's value over the pixels it stands for: blending must not show."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, latents: torch.Tensor, generator=None) -> torch.Tensor:
        pixels = latents[:, :3].repeat_interleave(32, -1).repeat_interleave(32, -2).repeat_interleave(8, 2)
        return pixels[:, :, 7:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blending_leaves_equal_tiles_as_they_are(config, dtype) -> None:
    latents = torch.randn(1, 8, 9, 7, 5).to(dtype)
    decoder = ConstantDecoder(config)
    blended = decode(decoder, latents, TileConfig.for_decoding(96, 32, 24, 8))
    assert blended.dtype == dtype
    torch.testing.assert_close(blended, decoder(latents), atol=1e-6 if dtype == torch.float32 else 0, rtol=0)


def test_pixels_may_be_bytes(encoder) -> None:
    pixels = torch.randint(0, 256, (1, 3, 9, 96, 160), dtype=torch.uint8)
    tiles = TileConfig(spatial_size=96, spatial_overlap=64)
    assert torch.equal(encode(encoder, pixels, tiles), encode(encoder, pixels.float() / 127.5 - 1, tiles))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"spatial_size": 32}, "32"),
        ({"spatial_size": 100}, "100"),
        ({"spatial_size": 128, "spatial_overlap": 48}, "48"),
        ({"spatial_size": 128, "spatial_overlap": 128}, "128"),
        ({"temporal_size": 8}, "8"),
        ({"temporal_size": 20}, "20"),
        ({"temporal_size": 32, "temporal_overlap": 12}, "12"),
        ({"temporal_size": 32, "temporal_overlap": 32}, "32"),
        ({"chunk_size": 0}, "0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values, named) -> None:
    for make in (TileConfig, TileConfig.for_encoding):
        with pytest.raises(UserError, match=named):
            make(**values)
    with pytest.raises(ValueError, match=named):
        TileConfig(**values)


def test_small_overlaps_are_raised_and_large_defaults_lowered(caplog) -> None:
    caplog.set_level(logging.INFO)
    assert TileConfig.for_encoding(spatial_size=128, spatial_overlap=32).spatial_overlap == 64
    assert caplog.records[-1].levelno == logging.WARNING
    assert TileConfig.for_encoding(temporal_size=16, temporal_overlap=8).temporal_overlap == 8
    assert TileConfig.for_encoding(temporal_size=32, temporal_overlap=8).temporal_overlap == 16
    caplog.clear()
    lowered = TileConfig.for_encoding(spatial_size=64, temporal_size=16)
    assert (lowered.spatial_overlap, lowered.temporal_overlap) == (32, 8)
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    caplog.clear()
    assert TileConfig.for_encoding(spatial_size=512, temporal_size=64) == TileConfig(512, 64, 64, 24)
    assert not caplog.records


def test_chunk_size_is_restored_after_an_error(encoder) -> None:
    with pytest.raises(RuntimeError, match="stop"), convolution_chunks(encoder, 4):
        raise RuntimeError("stop")
    assert encoder.conv_in.chunk_size is None
