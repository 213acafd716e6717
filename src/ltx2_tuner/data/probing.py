"""Looking into source files: picture size, number of frames, frame rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ltx2_tuner.data.buckets import Size
from ltx2_tuner.data.config import Dataset
from ltx2_tuner.data.frame_rate import FrameRate
from ltx2_tuner.data.sources import IMAGE_EXTENSIONS, Failure, Source, directory_files
from ltx2_tuner.errors import UserError

FrameLimit = Callable[[float | None], int | None]  # frames/s -> how many source frames matter (None: all)


@dataclass(frozen=True)
class Measured:
    """Facts about a source: upright pixels, frames (as far as they were counted), frames/s (None: unknown)."""

    size: Size | None
    frames: int
    fps: float | None = None
    is_vfr: bool = False


class Probe(Protocol):
    """How clips are looked into."""

    def __call__(self, path: Path, limit: FrameLimit) -> Measured: ...


def probe_clip(path: Path, limit: FrameLimit) -> Measured:
    """Look into a clip, counting frames no further than needed.

    Raises:
        MediaError: it cannot be decoded.
    """
    from ltx2_tuner.media import video

    info = video.count_frames(path, limit(video.stated_fps(path)))
    return Measured((info.width, info.height), info.frames, info.fps, info.is_vfr)


def measure(source: Source, dataset: Dataset, probe: Probe = probe_clip) -> Measured | Failure:
    """Look into one source; what cannot be read comes back as a failure. Runs in worker processes too."""
    from ltx2_tuner.media.images import image_size

    try:
        if dataset.item_kind == "audio":
            return Measured(None, 0)
        if source.form == "image":
            return Measured(image_size(source.path), 1)
        if source.form == "frames":
            pictures = directory_files(source.path, IMAGE_EXTENSIONS)
            return Measured(image_size(pictures[0]), len(pictures))
        return probe(source.path, partial(frames_needed, dataset))
    except UserError as error:
        return Failure(source.path.name, str(error))


def frames_needed(dataset: Dataset, fps: float | None) -> int | None:
    """How many source frames of a clip decide about its items; None: all of them."""
    if dataset.frame_extraction not in ("head", "full"):
        return None
    outputs = dataset.max_frames if dataset.frame_extraction == "full" else max(dataset.target_frames)
    return FrameRate(dataset.source_fps or fps, dataset.target_fps).source_index(outputs - 1) + 1
