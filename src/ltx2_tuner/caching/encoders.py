"""The video encoder as the cache script uses it: batches of 8-bit frames in, latents on the CPU out.

Running out of device memory is met by smaller batches, then by chunks in time, then by tiles.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ltx2_tuner.data.metadata import canonical_json
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.video_vae import VideoEncoder, tiling
from ltx2_tuner.models.video_vae.tiling import TileConfig

logger = logging.getLogger(__name__)

# What is tried when a single clip does not fit: frames a convolution takes, tile side and length with overlaps.
FALLBACK_CHUNK = 8
FALLBACK_SPATIAL = (512, 64)
FALLBACK_TEMPORAL = (64, 24)


def pad_frames(frames: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) with the last frame repeated up to the next 8n + 1 frames."""
    missing = (1 - len(frames)) % 8
    return np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)]) if missing else frames


def tile_settings(tiles: TileConfig) -> dict[str, int] | None:
    """Sizes and overlaps of tiles, which change latents; chunks do not. None without tiles."""
    used = {}
    if tiles.spatial_size:
        used |= {"spatial_size": tiles.spatial_size, "spatial_overlap": tiles.spatial_overlap}
    if tiles.temporal_size:
        used |= {"temporal_size": tiles.temporal_size, "temporal_overlap": tiles.temporal_overlap}
    return used or None


class VideoLatents:
    """Encodes clips of equal size.

    Attributes:
        tiles: the tiles in use; after running out of memory others than were asked for.
        fallbacks: what had to be done to fit the memory, for the summary.
    """

    def __init__(self, encoder: VideoEncoder, tiles: TileConfig) -> None:
        # As the activations are: convolutions would bring them into this order at every call.
        self.encoder = encoder.to(memory_format=torch.channels_last_3d)
        self.tiles = self._asked = tiles
        self.fallbacks: list[str] = []
        self._largest_batch: int | None = None

    def encode(self, clips: Sequence[np.ndarray]) -> list[Tensor]:
        """Clips, each uint8 (N, H, W, 3), to latents (C, F, H / 32, W / 32) on the CPU.

        Raises:
            UserError: even one clip in tiles does not fit into the device memory.
        """
        size = min(len(clips), self._largest_batch or len(clips))
        try:
            return [
                latent for start in range(0, len(clips), size) for latent in self._batch(clips[start : start + size])
            ]
        except torch.OutOfMemoryError:
            pass  # outside the handler the failed tensors are released
        self._retreat(size, clips[0].shape)
        return self.encode(clips)

    def with_tiles_used(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """The metadata of a file, with the tiles that were used where the memory called for them.

        They stand beside the tiles that were asked for, so that the file fits the same command later.
        """
        if self.tiles == self._asked:
            return dict(metadata)
        settings = json.loads(metadata["preprocess"]) | {"tiles_used": tile_settings(self.tiles)}
        return {**metadata, "preprocess": canonical_json(settings)}

    def _batch(self, clips: Sequence[np.ndarray]) -> list[Tensor]:
        padded = [pad_frames(clip) for clip in clips]
        pixels = torch.from_numpy(padded[0][None] if len(padded) == 1 else np.stack(padded))  # (B, N, H, W, 3)
        latents = tiling.encode(self.encoder, pixels.permute(0, 4, 1, 2, 3), self.tiles)
        return list(latents.cpu())

    def _retreat(self, size: int, shape: tuple[int, ...]) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size > 1:
            self._largest_batch = size // 2
            self._note(f"batches of {self._largest_batch}")
        elif self.tiles.chunk_size is None:
            self._use("--vae_chunk_size", FALLBACK_CHUNK, chunk_size=FALLBACK_CHUNK)
        elif self.tiles.spatial_size is None:
            side, overlap = FALLBACK_SPATIAL
            self._use("--vae_spatial_tile_size", side, spatial_size=side, spatial_overlap=overlap)
        elif self.tiles.temporal_size is None:
            length, overlap = FALLBACK_TEMPORAL
            self._use("--vae_temporal_tile_size", length, temporal_size=length, temporal_overlap=overlap)
        else:
            frames, height, width = shape[:3]
            raise UserError(
                f"a clip of {width}x{height}, {frames} frames does not fit into the device memory even in tiles; "
                "use smaller --vae_spatial_tile_size and --vae_temporal_tile_size, or a lower resolution"
            )

    def _use(self, flag: str, value: int, **tiles: int) -> None:
        self.tiles = replace(self.tiles, **tiles)
        self._note(f"{flag} {value}")

    def _note(self, remedy: str) -> None:
        self.fallbacks.append(remedy)
        logger.warning("out of device memory while encoding: going on with %s", remedy)
