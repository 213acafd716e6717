"""What decode workers do: pictures of a clip cut into windows, sound cut into spans. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ltx2_tuner.data.frame_rate import FrameRate
from ltx2_tuner.data.sources import IMAGE_EXTENSIONS, directory_files
from ltx2_tuner.errors import UserError
from ltx2_tuner.media import audio
from ltx2_tuner.media.images import read_image
from ltx2_tuner.media.resize import cover_crop
from ltx2_tuner.media.video import count_frames, select_frames

CRASHED = "the decoder crashed on this file; encode it again or take it out"


@dataclass(frozen=True)
class Failed:
    """The rest of a job cannot be had, and why."""

    reason: str


@dataclass(frozen=True)
class NoTrack:
    """The file has no sound stream."""


@dataclass(frozen=True)
class PictureJob:
    """Windows of one source. form: image, video or frames. size: pixels (width, height) to resize and crop to.

    windows: (start, count) in output frames of `rate`. hold_last: repeat the last frame of a source that ends early.
    """

    path: Path
    form: str
    size: tuple[int, int]
    rate: FrameRate
    windows: tuple[tuple[int, int], ...]
    hold_last: bool = False


@dataclass(frozen=True)
class SoundJob:
    """Spans of one sound track. spans: seconds (start, end), None for the whole track.

    stretch: factor of the time stretch that fits the sound to re-timed pictures, 1.0 for none. peak_db: dBFS that the
    whole track's peak is brought to, None to leave it.
    """

    path: Path
    spans: tuple[tuple[float, float] | None, ...]
    stretch: float = 1.0
    peak_db: float | None = None


def decode_pictures(job: PictureJob) -> Iterator[tuple[int, np.ndarray] | Failed]:
    """Windows as (index into job.windows, uint8 (N, H, W, 3)), by the frame they end at; or what went wrong.

    Holds no more frames than the windows that are open at a time need.
    """
    ends = [start + count for start, count in job.windows]
    order = sorted(range(len(ends)), key=lambda index: ends[index])
    outputs = sorted({frame for start, count in job.windows for frame in range(start, start + count)})
    held: dict[int, np.ndarray] = {}
    frames = _frames(job, [job.rate.source_index(output) for output in outputs])
    try:
        for output, pixels in zip(outputs, _hold_last(job, frames) if job.hold_last else frames):
            held[output] = pixels
            while order and ends[order[0]] == output + 1:
                index = order.pop(0)
                start, count = job.windows[index]
                yield index, np.stack([held[frame] for frame in range(start, start + count)])
            first = min((job.windows[index][0] for index in order), default=output + 1)
            for frame in [frame for frame in held if frame < first]:
                del held[frame]
    except (UserError, OSError) as error:
        yield Failed(str(error))
        return
    if order:
        yield Failed(f"{job.path}: the clip ended before frame {ends[order[0]]}; the file changed or is damaged")


def _frames(job: PictureJob, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Resized source frames, uint8 (H, W, 3), one for each index while the source lasts."""
    resize = partial(cover_crop, width=job.size[0], height=job.size[1])
    if job.form == "video":
        yield from select_frames(job.path, indices, resize=resize)
        return
    files = _pictures(job)
    for index in indices:
        if index >= len(files):
            return
        yield resize(read_image(files[index]))


def _hold_last(job: PictureJob, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """`frames`, then the last frame of the source for ever."""
    pixels = None
    for pixels in frames:
        yield pixels
    if pixels is None:  # the window begins after the end
        last = (count_frames(job.path).frames if job.form == "video" else len(_pictures(job))) - 1
        pixels = next(_frames(job, [last]))
    while True:
        yield pixels


def _pictures(job: PictureJob) -> list[Path]:
    return directory_files(job.path, IMAGE_EXTENSIONS) if job.form == "frames" else [job.path]


def decode_sound(job: SoundJob) -> Iterator[tuple[int, np.ndarray, int] | Failed | NoTrack]:
    """Spans as (index into job.spans, float32 (2, S), samples/s), in order; or what went wrong.

    S is 0 for a span after the end of the track.
    """
    try:
        if not audio.has_audio(job.path):
            yield NoTrack()
            return
        # The peak of the whole track is needed to scale any part of it.
        whole = job.peak_db is not None or None in job.spans
        end = None if whole else max(span[1] for span in job.spans)
        track, rate = audio.read_audio(job.path, None, end)
    except (UserError, OSError) as error:
        yield Failed(str(error))
        return
    track = audio.to_stereo(track)
    if job.peak_db is not None:
        track = audio.peak_normalise(track, job.peak_db)
    for index, span in enumerate(job.spans):
        begin, end = (0, track.shape[1]) if span is None else (round(span[0] * rate), round(span[1] * rate))
        part = track[:, begin:end]
        if job.stretch != 1.0 and part.shape[1]:
            part = audio.time_stretch(part, rate, round(part.shape[1] * job.stretch))
        yield index, np.ascontiguousarray(part), rate
