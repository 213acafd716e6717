"""Which source frame stands at which output frame: exact index arithmetic, no decoding.

A clip of `source` frames per second is trained as if it ran at `target`. Where the two are close (the source rate,
rounded up, within one of the target) every frame is kept; otherwise frames are dropped or repeated. Everything after
this step (windows, counts, limits) counts *output* frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


def _exact(rate: float) -> Fraction:
    return Fraction(rate).limit_denominator(100_000)


@dataclass(frozen=True)
class FrameRate:
    """The rate of one clip and the rate it is trained at, in frames per second.

    `source` is None when nothing knows it (folders of pictures): then no frame is dropped or repeated.
    """

    source: float | None
    target: float

    @property
    def resampled(self) -> bool:
        """Whether frames are dropped or repeated."""
        return self.source is not None and abs(math.ceil(self.source) - self.target) > 1

    @property
    def repeats_frames(self) -> bool:
        """Whether source frames stand more than once in the output (the target rate is higher)."""
        return self.resampled and self.target > self.source

    @property
    def frame_seconds(self) -> float:
        """Source time covered by one output frame, in seconds (what sound is cut by)."""
        rate = self.target if self.resampled or self.source is None else self.source
        return float(1 / _exact(rate))

    @property
    def stretch(self) -> float:
        """Duration of an item at the training rate over its duration in the source (1.0: no sound stretching)."""
        rate = self.target if self.resampled or self.source is None else self.source
        return float(_exact(rate) / _exact(self.target))

    def output_count(self, source_frames: int) -> int:
        """How many output frames `source_frames` source frames give."""
        if source_frames <= 0 or not self.resampled:
            return max(source_frames, 0)
        return (source_frames - 1) * _exact(self.target) // _exact(self.source) + 1

    def source_index(self, output_index: int) -> int:
        """The source frame that stands at an output frame."""
        if not self.resampled:
            return output_index
        position = output_index * _exact(self.source) / _exact(self.target)
        return math.floor(position) if self.repeats_frames else math.ceil(position)

    def source_indices(self, start: int, count: int) -> list[int]:
        """The source frames of the output window [start, start + count)."""
        return [self.source_index(index) for index in range(start, start + count)]


def detection_line(rate: FrameRate, name: str) -> str:
    """Log line for a rate read from the container; `name` is the base name of the file."""
    return f"Auto-detected source FPS: {rate.source:.2f} for {name}"


def resampling_line(rate: FrameRate, name: str) -> str:
    """Log line for a clip whose frames are dropped or repeated."""
    return f"Resampling {name}: {rate.source:.2f} FPS -> {rate.target:.2f} FPS"
