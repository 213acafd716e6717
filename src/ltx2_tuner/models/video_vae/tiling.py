"""Encoding and decoding in pieces, for clips whose activations would not fit.

Three independent means. Temporal chunks inside each convolution change nothing but the peak memory. Tiled encoding
and tiled decoding cut the clip itself; tiles see less of their surroundings, so results differ slightly.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.video_vae.decoder import VideoDecoder
from ltx2_tuner.models.video_vae.encoder import VideoEncoder, drop_incomplete
from ltx2_tuner.models.video_vae.layers import CausalConv3d
from ltx2_tuner.models.video_vae.layout import (
    AxisTile,
    decode_space,
    decode_tile_sizes,
    decode_time,
    encode_space,
    encode_time,
)

logger = logging.getLogger(__name__)

# Pixels and frames a latent stands for in every released autoencoder: the units of the tiling flags.
SPATIAL_UNIT = 32
TEMPORAL_UNIT = 8
# Smaller overlaps leave no latent to discard on either side of a seam when encoding.
MIN_SPATIAL_OVERLAP = 64
MIN_TEMPORAL_OVERLAP = 16
SMALLEST_WEIGHT = 1e-8


class TileError(UserError, ValueError):
    """Tile sizes that do not fit each other; the message names the flag to change."""


@dataclass(frozen=True)
class TileConfig:
    """How to cut a clip: sizes and overlaps in pixels and frames, None for no cut along that axis.

    `chunk_size` is the number of frames each convolution takes at a time, None for all.
    """

    spatial_size: int | None = None
    spatial_overlap: int = 64
    temporal_size: int | None = None
    temporal_overlap: int = 24
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise TileError(f"the VAE chunk size is {self.chunk_size} frames; give 1 or more (--vae_chunk_size)")
        _check("spatial", self.spatial_size, self.spatial_overlap, 2 * SPATIAL_UNIT, SPATIAL_UNIT)
        _check("temporal", self.temporal_size, self.temporal_overlap, 2 * TEMPORAL_UNIT, TEMPORAL_UNIT)

    @classmethod
    def for_encoding(
        cls,
        spatial_size: int | None = None,
        spatial_overlap: int = 64,
        temporal_size: int | None = None,
        temporal_overlap: int = 24,
        chunk_size: int | None = None,
    ) -> TileConfig:
        """Tiles from the flags of the cache script, the overlaps brought to what encoding needs.

        An overlap below 64 px or 16 frames is raised as far as the tile leaves room, with a warning; a default
        overlap too large for the tile is lowered.
        """
        spatial_overlap = _encoding_overlap(
            "spatial", spatial_size, spatial_overlap, MIN_SPATIAL_OVERLAP, SPATIAL_UNIT, cls.spatial_overlap
        )
        temporal_overlap = _encoding_overlap(
            "temporal", temporal_size, temporal_overlap, MIN_TEMPORAL_OVERLAP, TEMPORAL_UNIT, cls.temporal_overlap
        )
        return cls(spatial_size, spatial_overlap, temporal_size, temporal_overlap, chunk_size)

    @classmethod
    def for_decoding(
        cls,
        spatial_size: int = 512,
        spatial_overlap: int = 64,
        temporal_size: int = 0,
        temporal_overlap: int = 8,
        chunk_size: int | None = None,
    ) -> TileConfig:
        """Tiles from the sampling flags; a temporal size of 0 makes no cut in time."""
        return cls(spatial_size, spatial_overlap, temporal_size or None, temporal_overlap, chunk_size)


def _check(axis: str, size: int | None, overlap: int, smallest: int, unit: int) -> None:
    if size is None:
        return
    if size < smallest or size % unit:
        raise TileError(f"the {axis} VAE tile size is {size}; give a multiple of {unit} that is at least {smallest}")
    if overlap < 0 or overlap % unit or overlap >= size:
        raise TileError(
            f"the {axis} VAE tile overlap is {overlap}; give a multiple of {unit} below the tile size {size}"
        )


def _encoding_overlap(axis: str, size: int | None, overlap: int, floor: int, unit: int, default: int) -> int:
    """The overlap to encode with; one that breaks a rule for good is returned as it is, to be refused."""
    if size is None or size < 2 * unit or overlap % unit or overlap < 0:
        return overlap
    if overlap >= size and overlap != default:
        return overlap
    fitting = min(max(overlap, floor), size - unit)
    if fitting != overlap:
        level = logging.INFO if overlap == default else logging.WARNING
        logger.log(level, "%s VAE tile overlap %d does not suit tiles of %d: using %d", axis, overlap, size, fitting)
    return fitting


@contextmanager
def convolution_chunks(model: nn.Module, chunk_size: int | None) -> Iterator[None]:
    """While open, each causal convolution of `model` takes `chunk_size` frames at a time (None: all)."""
    convolutions = [module for module in model.modules() if isinstance(module, CausalConv3d)]
    before = [convolution.chunk_size for convolution in convolutions]
    try:
        for convolution in convolutions:
            convolution.chunk_size = chunk_size
        yield
    finally:
        for convolution, previous in zip(convolutions, before):
            convolution.chunk_size = previous


@torch.no_grad()
def encode(encoder: VideoEncoder, pixels: Tensor, tiles: TileConfig | None = None) -> Tensor:
    """Pixels (B, 3, N, H, W) -> normalised latents (B, C, F, h, w) on the encoder's device, in its dtype.

    `pixels` are uint8, or floating point in [-1, 1], on any device: tiles move to the encoder one by one. Where
    every axis fits one tile the result is that of `encoder(pixels)` to the bit.
    """
    tiles = tiles or TileConfig()
    config = encoder.config
    pixels = drop_incomplete(pixels, config.temporal_scale)
    frames, height, width = pixels.shape[2:]
    shape = (pixels.shape[0], *config.latent_shape((frames, height, width)))
    times = encode_time(frames, tiles.temporal_size, tiles.temporal_overlap, config.temporal_scale)
    rows, columns = (
        encode_space(length, tiles.spatial_size, tiles.spatial_overlap, config.spatial_scale)
        for length in (height, width)
    )
    with convolution_chunks(encoder, tiles.chunk_size):
        if len(times) * len(rows) * len(columns) == 1:
            return encoder(_to_encoder(pixels, encoder))
        latents, total = None, None
        for cell in itertools.product(times, rows, columns):
            time, row, column = (tile.source for tile in cell)
            part = encoder(_to_encoder(pixels[:, :, time, row, column], encoder))
            if latents is None:
                latents = torch.zeros(shape, device=part.device)
                total = torch.zeros(shape[2:], device=part.device)
            target = tuple(tile.target for tile in cell)
            weights = _outer(cell).to(part.device)
            latents[(..., *target)] += part * weights
            total[target] += weights
    return (latents / total.clamp_min(SMALLEST_WEIGHT)).to(part.dtype)


def _to_encoder(pixels: Tensor, encoder: VideoEncoder) -> Tensor:
    weight = encoder.conv_in.conv.weight
    pixels = pixels.to(weight.device)
    if pixels.dtype == torch.uint8:
        pixels = pixels.float().div_(127.5).sub_(1)
    return pixels.to(weight.dtype)


def _outer(cell: tuple[AxisTile, ...]) -> Tensor:
    """Weights (F, H, W) of a cell from its three axes."""
    time, row, column = (tile.weights for tile in cell)
    return time[:, None, None] * row[:, None] * column


@torch.no_grad()
def decode(
    decoder: VideoDecoder,
    latents: Tensor,
    tiles: TileConfig | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normalised latents (B, C, F, h, w) -> pixels (B, 3, N, H, W), nominally in [-1, 1], in the latents' dtype.

    Where every axis fits one tile the result is that of `decoder(latents)` to the bit.
    """
    return torch.cat(list(decode_pieces(decoder, latents, tiles, generator)), dim=2)


@torch.no_grad()
def decode_pieces(
    decoder: VideoDecoder,
    latents: Tensor,
    tiles: TileConfig | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The frames of `decode` in order, as (B, 3, n, H, W) pieces: one piece a temporal tile."""
    tiles = tiles or TileConfig()
    times, rows, columns = _decode_layout(decoder, latents, tiles)
    with convolution_chunks(decoder, tiles.chunk_size):
        if len(times) * len(rows) * len(columns) == 1:
            yield decoder(latents, generator=generator)
            return
        buffer, weights = None, None  # weighted sum (B, 3, n, H, W) and weights (n, H, W) of frames not yet given out
        for index, time in enumerate(times):
            summed, total = _decode_slice(decoder, latents, (time, rows, columns), generator)
            if buffer is not None:
                overlap = buffer.shape[2]
                summed[:, :, :overlap] += buffer
                total[:overlap] += weights
            last = index == len(times) - 1
            ready = summed.shape[2] if last else times[index + 1].target.start - time.target.start
            piece = summed[:, :, :ready] / total[:ready].clamp_min(SMALLEST_WEIGHT)
            yield piece.to(latents.dtype)
            buffer, weights = summed[:, :, ready:], total[ready:]


def _decode_layout(
    decoder: VideoDecoder, latents: Tensor, tiles: TileConfig
) -> tuple[list[AxisTile], list[AxisTile], list[AxisTile]]:
    frames, height, width = latents.shape[2:]
    space, time = decoder.config.spatial_scale, decoder.config.temporal_scale
    row_size = column_size = None
    if tiles.spatial_size is not None:
        row_size, column_size = decode_tile_sizes(
            height, width, tiles.spatial_size // space, tiles.spatial_overlap // space
        )
    return (
        decode_time(frames, tiles.temporal_size and tiles.temporal_size // time, tiles.temporal_overlap // time, time),
        decode_space(height, row_size, tiles.spatial_overlap // space, space),
        decode_space(width, column_size, tiles.spatial_overlap // space, space),
    )


def _decode_slice(
    decoder: VideoDecoder,
    latents: Tensor,
    axes: tuple[AxisTile, list[AxisTile], list[AxisTile]],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum (B, 3, n, H, W) and weights (n, H, W) of all spatial tiles of one temporal tile."""
    time, rows, columns = axes
    shape = (time.weights.numel(), rows[-1].target.stop, columns[-1].target.stop)
    # Half precision would lose the small ends of the ramps.
    dtype = torch.promote_types(latents.dtype, torch.float32)
    summed = torch.zeros((latents.shape[0], decoder.config.out_channels, *shape), dtype=dtype, device=latents.device)
    total = torch.zeros(shape, dtype=dtype, device=latents.device)
    for row, column in itertools.product(rows, columns):
        part = decoder(latents[:, :, time.source, row.source, column.source], generator=generator)
        weights = _outer((time, row, column)).to(total)
        summed[..., row.target, column.target] += part * weights
        total[..., row.target, column.target] += weights
    return summed, total
