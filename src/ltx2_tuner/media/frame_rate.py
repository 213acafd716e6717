"""Which source frames make up a clip at another frame rate: exact index arithmetic, no decoding."""

from __future__ import annotations

import math
from fractions import Fraction


def exact_rate(rate: float | Fraction) -> Fraction:
    """A frame rate as a fraction with a small denominator: 29.97002997 becomes 30000/1001."""
    return Fraction(rate).limit_denominator(100_000)


def needs_resampling(source: float | Fraction | None, target: float | Fraction | None) -> bool:
    """True when a clip of `source` frames/s must be resampled to `target` frames/s.

    Neighbouring rates pass through: 23.976, 24, 25 and 26 for a target of 25. Unknown rates are never resampled.
    """
    if source is None or target is None:
        return False
    return abs(math.ceil(exact_rate(source)) - exact_rate(target)) > 1


class FrameSelection:
    """Maps output frames to source frames, for one clip.

    Frames are dropped when the source is faster, repeated when it is slower, and passed through when
    `needs_resampling` says no.
    """

    def __init__(self, source: float | Fraction | None, target: float | Fraction | None) -> None:
        self.resamples = needs_resampling(source, target)
        # Source frames per output frame.
        self._step = exact_rate(source) / exact_rate(target) if self.resamples else Fraction(1)

    @property
    def repeats(self) -> bool:
        """True when source frames appear more than once."""
        return self._step < 1

    def source_index(self, output: int) -> int:
        """The source frame shown as output frame `output`."""
        position = output * self._step
        return math.floor(position) if self.repeats else math.ceil(position)

    def output_count(self, source_frames: int) -> int:
        """How many output frames `source_frames` source frames give."""
        return math.floor((source_frames - 1) / self._step) + 1 if source_frames > 0 else 0

    def source_count(self, output_frames: int) -> int:
        """How many source frames must be decoded for the first `output_frames` output frames."""
        return self.source_index(output_frames - 1) + 1 if output_frames > 0 else 0


def time_step(source: float | Fraction | None, target: float | Fraction) -> Fraction:
    """Seconds of source time from one output frame to the next (used to cut sound)."""
    if source is None or needs_resampling(source, target):
        return 1 / exact_rate(target)
    return 1 / exact_rate(source)
