"""Reading clips: header facts, a counting pass, and frames as 8-bit RGB."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ltx2_tuner.media.errors import MediaError, reading

# The first frames' timestamps that the variable frame rate check looks at, and the spread it tolerates.
TIMED_FRAMES = 64
MAX_TIME_SPREAD = 0.20
MAX_RATE_DIFFERENCE = 0.05

# Several clips are decoded at a time, and each thread holds a frame of its own.
DECODER_THREADS = 4

Resize = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a clip.

    width, height: pixels of the upright picture. fps: average frames/s, None when the container does not say.
    frames: frames in the file (counted by `count_frames`, the container's claim or 0 otherwise). duration: seconds,
    0 when unknown. rotation: degrees counter-clockwise that make the stored picture upright. is_vfr: the frame rate
    looks variable. start_time: seconds on the container's clock of the first frame.
    """

    width: int
    height: int
    fps: float | None
    frames: int
    duration: float
    rotation: int
    is_vfr: bool
    has_audio: bool
    start_time: float = 0.0


def probe(path: str | os.PathLike) -> VideoInfo:
    """Read a clip's header and decode its first frame.

    Raises:
        MediaError: missing, damaged, or without a picture stream.
    """
    return _inspect(path, TIMED_FRAMES, exact=False)


def count_frames(path: str | os.PathLike, limit: int | None = None) -> VideoInfo:
    """Like `probe`, with `frames` counted by decoding (at most `limit` frames, in presentation order).

    Raises:
        MediaError: the file is damaged or cut off before the limit, or holds no frame.
    """
    return _inspect(path, limit, exact=True)


def iter_frames(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """All frames of the first picture stream in presentation order, upright, uint8 (H, W, 3).

    Raises:
        MediaError: missing, damaged, cut off, or without a frame.
    """
    for frame in _decoded(path):
        yield _upright(frame.to_ndarray(format="rgb24"), frame.rotation)


def select_frames(
    path: str | os.PathLike, indices: Iterable[int], *, resize: Resize | None = None
) -> Iterator[np.ndarray]:
    """Chosen frames of a clip one by one, decoding no further than the last of them.

    Args:
        indices: source frame numbers in presentation order, never decreasing; an index may repeat, which repeats the
            frame.
        resize: applied to each chosen frame once.

    Yields:
        uint8 (H, W, 3), upright, one for each index; fewer when the clip ends before them.

    Raises:
        MediaError: missing, damaged or cut off.
    """
    wanted = iter(indices)
    index = next(wanted, None)
    if index is None:
        return
    for number, frame in enumerate(_decoded(path)):
        if number < index:
            continue
        pixels = _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
        pixels = resize(pixels) if resize else pixels
        while index == number:
            yield pixels
            index = next(wanted, None)
        if index is None:
            return


def read_frames(
    path: str | os.PathLike, indices: Iterable[int] | None = None, *, resize: Resize | None = None
) -> np.ndarray:
    """The frames of `select_frames` together, every frame of the clip when `indices` is None.

    Returns:
        uint8 (N, H, W, 3). Shorter than `indices` when the clip ends before them.

    Raises:
        MediaError: missing, damaged, or ended before the first wanted frame.
    """
    chosen = list(select_frames(path, itertools.count() if indices is None else indices, resize=resize))
    if not chosen:
        raise MediaError(f"{path}: the clip ends before the first wanted frame")
    return np.stack(chosen)


def stated_fps(path: str | os.PathLike) -> float | None:
    """Frames/s according to the container: its average rate, else its base rate, else None.

    Raises:
        MediaError: missing, damaged, or without a picture stream.
    """
    import av

    with reading(path), av.open(os.fspath(path)) as container:
        rate = _stream_rate(_picture_stream(container, path))
    return float(rate) if rate else None


def _inspect(path: str | os.PathLike, limit: int | None, exact: bool) -> VideoInfo:
    import av

    with reading(path), av.open(os.fspath(path)) as container:
        stream = _picture_stream(container, path)
        rate, base = _stream_rate(stream), stream.base_rate
        duration = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        claimed = stream.frames
        has_audio = bool(container.streams.audio)
    first = None
    times: list[float] = []
    frames = 0
    for frame in _decoded(path):
        first = first if first is not None else frame
        frames += 1
        if len(times) < TIMED_FRAMES and frame.time is not None:
            times.append(frame.time)
        if limit is not None and frames >= limit:
            break
    rotation = round(first.rotation / 90) * 90
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    return VideoInfo(
        width=width,
        height=height,
        fps=float(rate) if rate else None,
        frames=frames if exact else max(claimed, 0),
        duration=duration,
        rotation=rotation,
        is_vfr=_is_variable(rate, base, times),
        has_audio=has_audio,
        start_time=times[0] if times else 0.0,
    )


def _decoded(path: str | os.PathLike) -> Iterator:
    """Decoded `av.VideoFrame`s; complains when the file yields none or ends before its own index does."""
    import av

    with reading(path), av.open(os.fspath(path)) as container:
        stream = _picture_stream(container, path)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = DECODER_THREADS
        expected = _indexed_packets(container, stream)
        packets = frames = 0
        end = 0.0
        for packet in container.demux(stream):
            packets += packet.size > 0
            if packet.is_corrupt:
                raise MediaError(f"{path}: damaged after {frames} frames; replace the file or take it out")
            for frame in packet.decode():
                frames += 1
                if frame.time is not None:
                    end = max(end, frame.time + float((frame.duration or 0) * frame.time_base))
                yield frame
        if not frames:
            raise MediaError(f"{path}: no picture could be decoded; the file is empty or damaged")
        if packets < expected or _ends_early(container, path, end):
            raise MediaError(f"{path}: the file is cut off after {frames} frames; copy it again or take it out")


def _picture_stream(container, path: str | os.PathLike):
    """The first picture stream that is not a cover image."""
    import av

    streams = [
        stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise MediaError(f"{path}: there is no picture stream in it")
    return streams[0]


def _stream_rate(stream) -> Fraction | None:
    for rate in (stream.average_rate, stream.base_rate):
        if rate is not None and rate > 0:
            return rate
    return None


def _indexed_packets(container, stream) -> int:
    """How many packets the container's own index promises for a stream; 0 when it has no complete index."""
    kind = container.format.name
    if "mp4" in kind and hasattr(stream, "index_entries"):
        return len(stream.index_entries)
    if kind == "avi":
        return stream.frames
    return 0


def _ends_early(container, path: str | os.PathLike, end: float) -> bool:
    """Matroska has no full index: compare the duration in its header with where its last packets end (seconds)."""
    if "matroska" not in container.format.name or not container.duration:
        return False
    stated_end = container.duration / 1e6 - max(0.1, 0.005 * container.duration / 1e6)
    if end >= stated_end:
        return False
    import av

    with av.open(os.fspath(path)) as whole:
        ends = [
            float((packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in whole.demux()
            if packet.pts is not None
        ]
    return max(ends, default=0.0) < stated_end


def _is_variable(rate: Fraction | None, base: Fraction | None, times: list[float]) -> bool:
    if rate and base and abs(float(base) / float(rate) - 1) > MAX_RATE_DIFFERENCE:
        return True
    steps = np.diff(times)
    return len(steps) > 1 and bool(steps.max() - steps.min() > MAX_TIME_SPREAD * steps.mean())


def _upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Turn a stored picture by its display matrix (degrees counter-clockwise, rounded to quarter turns)."""
    turns = round(rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
