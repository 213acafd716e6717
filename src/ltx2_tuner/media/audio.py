"""Reading sound from any container, and the operations the caches need on it.

Samples are float32 (C, S): channels, samples. torch is imported only where it is needed, to keep decode workers small.
"""

from __future__ import annotations

import math
import os

import numpy as np

from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.media.errors import MediaError, reading

# Peaks below this count as silence.
SILENCE_PEAK = 1e-4
# Sound that starts this close to the picture, in seconds, counts as starting with it.
MAX_OFFSET = 0.005


def has_audio(path: str | os.PathLike) -> bool:
    """True when the file has a sound stream.

    Raises:
        MediaError: missing or damaged.
    """
    import av

    with reading(path), av.open(os.fspath(path)) as container:
        return bool(container.streams.audio)


def stated_seconds(path: str | os.PathLike) -> float:
    """Length of the file according to its header, in seconds; 0.0 when it does not say.

    Raises:
        MediaError: missing or damaged.
    """
    import av

    with reading(path), av.open(os.fspath(path)) as container:
        return (container.duration or 0) / 1e6


def read_audio(
    path: str | os.PathLike, start_s: float | None = None, end_s: float | None = None
) -> tuple[np.ndarray, int]:
    """The first sound stream of a file at its own rate and with its own channels.

    Time zero is the first frame of the picture, or the start of the sound in a file without one: sound that begins
    later is preceded by silence, and what comes earlier is dropped.

    Args:
        start_s, end_s: time range in seconds; None reaches to the beginning or end.

    Returns:
        float32 (C, S), 16-bit full scale being 1, and the rate in samples/s. S is 0 when the range lies outside.

    Raises:
        MediaError: missing, damaged, without a sound stream, or with samples that are not finite.
    """
    import av

    path = os.fspath(path)
    with reading(path), av.open(path) as container:
        _check_riff_size(path)
        if not container.streams.audio:
            raise MediaError(f"{path}: there is no sound stream in it")
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        origin = _picture_start(path)
        blocks, first = _decode(container, stream, None if end_s is None else end_s + (origin or 0))
        if not blocks:
            raise MediaError(f"{path}: no sound could be decoded; the stream is empty or damaged")
    samples = np.concatenate(blocks, axis=1)
    if origin is not None and abs(first - origin) > MAX_OFFSET:
        samples = _shift(samples, round((first - origin) * rate))
    if not np.isfinite(samples).all():
        raise MediaError(f"{path}: the sound holds values that are not finite; encode it again")
    begin = 0 if start_s is None else max(round(start_s * rate), 0)
    end = samples.shape[1] if end_s is None else max(round(end_s * rate), begin)
    return np.ascontiguousarray(samples[:, begin:end]), rate


def _decode(container, stream, until: float | None) -> tuple[list[np.ndarray], float]:
    """Sample blocks up to `until` seconds on the container's clock, and the time of the first sample."""
    import av

    resampler = av.AudioResampler(format="fltp")
    blocks: list[np.ndarray] = []
    first = None
    samples = 0
    for frame in container.decode(stream):
        if first is None:
            first = frame.time or 0.0
        for converted in resampler.resample(frame):
            blocks.append(converted.to_ndarray().astype(np.float32, copy=False))
            samples += converted.samples
        if until is not None and first + samples / frame.sample_rate > until:
            return blocks, first
    duration = stream.duration * stream.time_base if stream.duration else None
    states_length = container.format.name == "flac" or "mp4" in container.format.name
    if duration and states_length and samples / stream.codec_context.sample_rate < float(duration) - 0.1:
        raise MediaError(f"{container.name}: the sound is cut off; copy the file again or take it out")
    return blocks, first or 0.0


def _check_riff_size(path: str) -> None:
    """WAV files carry no index, but their first chunk says how long the file is."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head[:4] != b"RIFF":
            return
        stated = int.from_bytes(head[4:8], "little")
        # Files written to a pipe hold 0 or the highest number.
        if 0 < stated < 0xFFFFFFFF and stated + 8 > os.fstat(file.fileno()).st_size:
            raise MediaError(f"{path}: the sound is cut off; copy the file again or take it out")


def _picture_start(path: str) -> float | None:
    """Seconds on the container's clock of the first picture; None without a picture stream."""
    import av

    with av.open(path) as container:
        streams = [
            stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            return None
        frame = next(iter(container.decode(streams[0])), None)
        return frame.time if frame is not None else None


def _shift(samples: np.ndarray, count: int) -> np.ndarray:
    """Prepend `count` samples of silence, or drop that many when negative."""
    if count < 0:
        return samples[:, -count:]
    return np.concatenate([np.zeros((samples.shape[0], count), dtype=np.float32), samples], axis=1)


def to_stereo(samples: np.ndarray) -> np.ndarray:
    """(2, S): mono is duplicated, more than two channels are averaged and duplicated."""
    if samples.shape[0] == 2:
        return samples
    return np.repeat(samples.mean(axis=0, keepdims=True, dtype=np.float32), 2, axis=0)


def is_silent(samples: np.ndarray) -> bool:
    """True when no sample reaches the silence threshold."""
    return samples.size == 0 or float(np.abs(samples).max()) < SILENCE_PEAK


def peak_normalise(samples: np.ndarray, peak_db: float) -> np.ndarray:
    """Scale the whole track so that its peak is `peak_db` dBFS; a silent track stays as it is."""
    if is_silent(samples):
        return samples
    return samples * np.float32(10 ** (peak_db / 20) / np.abs(samples).max())


def stretch_windows(rate: int) -> tuple[int, int]:
    """(STFT size, hop) in samples that the time stretch uses at a rate."""
    size = 2 ** max(8, math.floor(math.log2(max(256, int(0.046 * rate)))))
    return size, min(max(64, int(0.0115 * rate)), size // 2)


def time_stretch(samples: np.ndarray, rate: int, length: int) -> np.ndarray:
    """Stretch or squeeze sound to exactly `length` samples without changing its pitch (phase vocoder).

    Args:
        samples: float32 (C, S).
        rate: samples/s, which sets the analysis window.
        length: samples wanted.
    """
    count = samples.shape[1]
    if count in (0, length):
        return samples
    if length == 0:
        return samples[:, :0]
    prepare_torchaudio()
    import torch
    import torchaudio.functional

    size, hop = stretch_windows(rate)
    window = torch.hann_window(size)
    # The centred transform mirrors half a window at each end and needs that many samples.
    padded = np.pad(samples, ((0, 0), (0, max(size // 2 + 1 - count, 0))))
    spectrum = torch.stft(torch.from_numpy(padded), size, hop, window=window, return_complex=True)
    advance = torch.linspace(0, math.pi * hop, spectrum.shape[-2])[:, None]
    stretched = torchaudio.functional.phase_vocoder(spectrum, count / length, advance)
    return torch.istft(stretched, size, hop, window=window, length=length).numpy()
