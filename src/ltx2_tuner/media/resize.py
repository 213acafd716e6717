"""Resize to cover a size, then cut out the centre."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image


def cover_size(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """(width, height) in pixels after scaling a picture until it covers the target."""
    scale = max(target_width / width, target_height / height)
    return (
        max(math.floor(width * scale + 0.5), target_width),
        max(math.floor(height * scale + 0.5), target_height),
    )


def lost_area(width: int, height: int, target_width: int, target_height: int) -> float:
    """Share of the picture, 0 to 1, that the centre crop cuts away."""
    covered_width, covered_height = cover_size(width, height, target_width, target_height)
    return 1 - target_width * target_height / (covered_width * covered_height)


def cover_crop(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale pictures to cover `width` x `height` pixels and crop the centre.

    Lanczos when enlarging, area averaging when shrinking.

    Args:
        frames: uint8 (H, W, 3) or (N, H, W, 3).

    Returns:
        uint8 (height, width, 3) or (N, height, width, 3).
    """
    if frames.ndim == 4:
        return np.stack([cover_crop(frame, width, height) for frame in frames])
    source_height, source_width = frames.shape[:2]
    if (source_width, source_height) == (width, height):
        return frames
    new_width, new_height = cover_size(source_width, source_height, width, height)
    left, top = (new_width - width) // 2, (new_height - height) // 2
    if max(width / source_width, height / source_height) > 1:
        image = Image.fromarray(frames).resize((new_width, new_height), Image.Resampling.LANCZOS)
        return np.asarray(image)[top : top + height, left : left + width]
    # Only the rows and columns that survive the crop are computed.
    rows = _average(frames, 0, new_height, top, height)
    both = _average(rows, 1, new_width, left, width)
    return np.clip(np.rint(both), 0, 255).astype(np.uint8)


def _average(pixels: np.ndarray, axis: int, size: int, start: int, count: int) -> np.ndarray:
    """Area averages along one axis: cells `start` to `start + count` of `size` equal cells, as float32."""
    indices, weights = _taps(pixels.shape[axis], size, start, count)
    shape = [1] * pixels.ndim
    shape[axis] = count
    total = np.zeros(shape, dtype=np.float32)
    for index, weight in zip(indices, weights):
        total = total + np.take(pixels, index, axis=axis) * weight.reshape(shape)
    return total


@functools.lru_cache(maxsize=64)
def _taps(source: int, size: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Source indices (taps, count) and coverage weights (taps, count) of each cell."""
    scale = source / size
    begin = np.arange(start, start + count, dtype=np.float64) * scale
    end = np.minimum(begin + scale, source)
    taps = math.ceil(scale) + 1
    indices = np.floor(begin).astype(np.int64) + np.arange(taps)[:, None]
    weights = np.clip(np.minimum(indices + 1, end) - np.maximum(indices, begin), 0, None)
    weights[weights < 1e-3] = 0  # rounding dust at cell borders
    weights /= weights.sum(axis=0)
    return np.clip(indices, 0, source - 1), weights.astype(np.float32)
