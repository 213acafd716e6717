"""Resolution buckets: which pixel size a picture or clip is resized and cropped to."""

from __future__ import annotations

import functools
import math

from ltx2_tuner.errors import UserError

STEP = 32  # pixels of one latent cell

Size = tuple[int, int]  # width, height in pixels


def bucket_step(has_references: bool, reference_downscale: int) -> int:
    """The multiple bucket sides must be of, so that a downscaled reference still has whole latent cells."""
    return STEP * reference_downscale if has_references and reference_downscale > 1 else STEP


@functools.lru_cache(maxsize=256)
def bucket_list(resolution: Size, step: int = STEP) -> tuple[Size, ...]:
    """All buckets of about the area of `resolution`, sorted ascending.

    Raises:
        UserError: the area is too small for a bucket of two steps a side.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    low = side // 2 // step * step
    if low < step:
        raise UserError(
            f"resolution {list(resolution)} is too small for bucketing; "
            f"use at least [{2 * step}, {2 * step}] or set enable_bucket = false"
        )
    found = set()
    for width in range(low, side + step, step):
        height = area // width // step * step
        found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def select_bucket(
    source: Size, resolution: Size, *, step: int = STEP, enabled: bool = True, no_upscale: bool = False
) -> Size:
    """The bucket of a source of `source` pixels.

    Raises:
        UserError: `no_upscale` and a side of the source is shorter than one step.
    """
    if not enabled:
        return resolution
    width, height = source
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        bucket = (width // step * step, height // step * step)
        if 0 in bucket:
            raise UserError(f"{width}x{height} is smaller than {step} px on one side; use a larger source")
        return bucket
    ratio = width / height
    return min(bucket_list(resolution, step), key=lambda size: abs(size[0] / size[1] - ratio))


def reference_size(bucket: Size, downscale: int) -> Size:
    """Pixel size of the reference of an item of size `bucket`."""
    if downscale <= 1:
        return bucket
    width, height = (max(side // downscale // STEP * STEP, STEP) for side in bucket)
    return width, height
