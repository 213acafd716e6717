"""Cutting a clip into training items: windows of 8n+1 output frames."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MODES = ("head", "chunk", "slide", "uniform", "full")


class Window(NamedTuple):
    """`count` output frames from output frame `start` on."""

    start: int
    count: int


def round8(frames: int) -> int:
    """The largest 8n+1 that is not above `frames` (>= 1): what the video VAE can hold without padding."""
    return (frames - 1) // 8 * 8 + 1


def pad8(frames: int) -> int:
    """The smallest 8n+1 that is not below `frames` (>= 1): how long a clip gets when its last frame is repeated."""
    return -(-(frames - 1) // 8) * 8 + 1


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` pixel frames, padded up to 8n+1 where needed."""
    return (pad8(frames) - 1) // 8 + 1


def windows(
    mode: str,
    frames: int,
    target_frames: Iterable[int],
    *,
    stride: int = 1,
    sample: int = 1,
    max_frames: int = 129,
) -> list[Window]:
    """The items of a clip of `frames` output frames, in order (targets ascending, then positions ascending).

    Args:
        mode: one of `MODES`.
        target_frames: item lengths, each rounded down to 8n+1; not used by `full`.
        stride: distance of `slide` positions, in frames.
        sample: number of `uniform` positions.
        max_frames: upper limit of `full`, in frames.
    """
    if frames < 1:
        return []
    if mode == "full":
        return [Window(0, round8(min(frames, max_frames)))]
    found = []
    for count in sorted({round8(target) for target in target_frames}):
        last = frames - count
        if last < 0:
            continue
        found += [Window(start, count) for start in _starts(mode, last, count, stride, sample)]
    return found


def _starts(mode: str, last: int, count: int, stride: int, sample: int) -> list[int]:
    """Positions of one target length; `last` is the highest possible one."""
    if mode == "head":
        return [0]
    if mode == "chunk":
        return list(range(0, last + 1, count))
    if mode == "slide":
        return list(range(0, last + 1, stride))
    if mode == "uniform":
        return sorted({index * last // max(sample - 1, 1) for index in range(sample)})
    raise ValueError(f"frame_extraction '{mode}' is none of {', '.join(MODES)}")
