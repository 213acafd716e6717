"""Running out of device memory: smaller batches, then chunks, then tiles, with the same latents as far as possible."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ltx2_tuner.caching.encoders import VideoLatents, pad_frames
from ltx2_tuner.checkpoint import Checkpoint, load_video_encoder, write_tiny_checkpoint
from ltx2_tuner.data.metadata import canonical_json, stale_reason
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.video_vae import tiling
from ltx2_tuner.models.video_vae.tiling import TileConfig


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return load_video_encoder(Checkpoint.open(path), "cpu", torch.float32)


@pytest.fixture
def clips():
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (9, 64, 96, 3), np.uint8) for _ in range(3)]


def small_memory(monkeypatch, fits):
    """Make every encode that does not fit fail as a GPU would."""
    encode = tiling.encode

    def limited(encoder, pixels, tiles):
        if not fits(len(pixels), tiles):
            raise torch.OutOfMemoryError("out of memory")
        return encode(encoder, pixels, tiles)

    monkeypatch.setattr(tiling, "encode", limited)


def test_latents_of_a_batch(encoder, clips):
    latents = VideoLatents(encoder, TileConfig()).encode(clips)
    assert [tuple(latent.shape[1:]) for latent in latents] == [(2, 2, 3)] * 3
    pixels = torch.from_numpy(clips[1])[None].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(latents[1], encoder(pixels)[0], atol=1e-5)


def test_batches_are_halved_first(encoder, clips, monkeypatch):
    expected = VideoLatents(encoder, TileConfig()).encode(clips)
    small_memory(monkeypatch, lambda size, tiles: size == 1)
    latents = VideoLatents(encoder, TileConfig())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(latents.encode(clips), expected))
    assert latents.fallbacks == ["batches of 1"]
    assert latents.tiles == TileConfig()


def test_then_chunks_then_tiles(encoder, clips, monkeypatch):
    small_memory(monkeypatch, lambda size, tiles: tiles.spatial_size is not None)
    latents = VideoLatents(encoder, TileConfig())
    latents.encode(clips[:1])
    assert latents.fallbacks == ["--vae_chunk_size 8", "--vae_spatial_tile_size 512"]
    assert latents.tiles.chunk_size == 8
    # The file says how it was made, and still fits the command that was given.
    asked = {"preprocess": canonical_json({"tiles": None})}
    written = latents.with_tiles_used(asked)
    assert json.loads(written["preprocess"])["tiles_used"] == {"spatial_overlap": 64, "spatial_size": 512}
    assert stale_reason(written, asked) is None


def test_what_fits_nowhere_is_an_error_that_says_what_to_do(encoder, clips, monkeypatch):
    small_memory(monkeypatch, lambda size, tiles: False)
    with pytest.raises(UserError, match=r"96x64, 9 frames .*--vae_spatial_tile_size"):
        VideoLatents(encoder, TileConfig()).encode(clips)


@pytest.mark.parametrize(("count", "padded"), [(1, 1), (2, 9), (9, 9), (10, 17)])
def test_clips_are_padded_to_whole_latent_frames(count, padded):
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    result = pad_frames(frames)
    assert len(result) == padded
    assert (result[count:] == count - 1).all()
