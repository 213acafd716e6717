"""Where tiles lie along one axis, and with which weight each of their outputs counts.

Encoding maps slices of pixels (or frames) to slices of latents and keeps the inner latents of each tile (weights 0
or 1). Decoding maps slices of latents to slices of pixels and blends neighbours with ramps that sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AxisTile:
    """One tile along one axis: what it reads, what it writes, and the weight of each position written."""

    source: slice
    target: slice
    weights: Tensor  # (target length,) float32


def split(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """[start, end) of tiles of `size` that overlap by `overlap` < `size`; the last ends at `length`."""
    if length <= size:
        return [(0, length)]
    stride = size - overlap
    count = (length + size - 2 * overlap - 1) // stride
    starts = [index * stride for index in range(count)]
    return [(start, start + size) for start in starts[:-1]] + [(starts[-1], length)]


def encode_space(length: int, size: int | None, overlap: int, scale: int) -> list[AxisTile]:
    """Tiles of `length` pixels; of an overlap, the left tile keeps all but its last latent, the right one the rest."""
    spans = split(length, size or length, overlap)
    tiles = []
    for index, (start, end) in enumerate(spans):
        weights = torch.ones((end - start) // scale)
        if index > 0:
            weights[: max(overlap // scale - 1, 0)] = 0
        if index < len(spans) - 1:
            weights[-1] = 0
        tiles.append(AxisTile(slice(start, end), slice(start // scale, end // scale), weights))
    return tiles


def encode_time(frames: int, size: int | None, overlap: int, scale: int) -> list[AxisTile]:
    """Tiles of `frames` = 8n+1 frames; a later tile drops its first latents, which miss their past."""
    spans = split(frames, size or frames, overlap)
    tiles = []
    for index, (start, end) in enumerate(spans):
        if index < len(spans) - 1:
            end += 1  # one frame more completes the tile's last latent
        first, last = start // scale, (end - 1) // scale + 1
        weights = torch.ones(last - first)
        if index > 0:
            weights[: overlap // scale] = 0
        tiles.append(AxisTile(slice(start, end), slice(first, last), weights))
    return tiles


def decode_space(length: int, size: int | None, overlap: int, scale: int) -> list[AxisTile]:
    """Tiles of `length` latents, `size` and `overlap` in latents, blended over the overlap's pixels."""
    spans = split(length, size or length, overlap)
    tiles = []
    for index, (start, end) in enumerate(spans):
        weights = torch.ones((end - start) * scale)
        ramp = overlap * scale
        if index > 0:
            weights[:ramp] *= torch.linspace(0, 1, ramp + 2)[1:-1]
        if index < len(spans) - 1 and ramp:
            weights[-ramp:] *= torch.linspace(1, 0, ramp + 2)[1:-1]
        tiles.append(AxisTile(slice(start, end), slice(start * scale, end * scale), weights))
    return tiles


def decode_time(length: int, size: int | None, overlap: int, scale: int) -> list[AxisTile]:
    """Tiles of `length` latent frames; a later tile starts one latent earlier and its false first frame counts zero."""
    spans = split(length, size or length, overlap)
    tiles = []
    for index, (start, end) in enumerate(spans):
        start -= index > 0
        first, last = start * scale, (end - 1) * scale + 1
        weights = torch.ones(last - first)
        ramp = overlap * scale
        if index > 0:
            weights[: ramp + 1] *= torch.linspace(0, 1, ramp + 2)[:-1]
        if index < len(spans) - 1 and ramp:
            weights[-ramp:] *= torch.linspace(1, 0, ramp + 2)[1:-1]
        tiles.append(AxisTile(slice(start, end), slice(first, last), weights))
    return tiles


def decode_tile_sizes(height: int, width: int, size: int, overlap: int) -> tuple[int, int]:
    """Tile height and width in latents: `size` along the longer side, in proportion along the shorter one."""
    longer = max(height, width)

    def along(length: int) -> int:
        return size if length == longer else max(2, overlap + 1, round(size * length / longer))

    return along(height), along(width)
