"""Makes small clips of every kind on the spot; no media file is committed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def has_encoder(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return False
    return True


def needs_encoder(name: str):
    return pytest.mark.skipif(not has_encoder(name), reason=f"this build of PyAV has no encoder {name}")


def numbered_frames(count: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 (count, height, width, 3); frame i is a grey of its own, with a white upper left quarter."""
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    frames[:] = frame_grey(np.arange(count))[:, None, None, None]
    frames[:, : height // 2, : width // 2] = 255
    return frames


def frame_grey(index) -> np.ndarray:
    return (np.asarray(index) * 7 % 200 + 16).astype(np.uint8)


def frame_numbers(frames: np.ndarray, count: int) -> list[int]:
    """Which numbered frame each picture shows, by the grey of its lower right corner."""
    greys = frame_grey(np.arange(count)).astype(int)
    corner = frames[:, -8:, -8:].reshape(len(frames), -1).mean(axis=1)
    return [int(np.abs(greys - value).argmin()) for value in corner]


def tone(rate: int, seconds: float, channels: int = 2, frequency: float = 440.0) -> np.ndarray:
    """float32 (channels, S): channel c plays the (c + 1)-fold frequency at half scale."""
    time = np.arange(round(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * frequency * (c + 1) * time) for c in range(channels)]).astype(np.float32)


def make_clip(
    path: Path,
    frames: np.ndarray,
    *,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    times: list[Fraction] | None = None,
    sound: np.ndarray | None = None,
    sound_rate: int = 48000,
    sound_codec: str = "aac",
    layout: str = "stereo",
    sound_start: float = 0.0,
    extra_streams: int = 0,
) -> Path:
    """Encode frames (N, H, W, 3), at `times` seconds when given, with sound (C, S) when given."""
    options = {"crf": "8"} if codec in ("libx264", "libx265") else {"preset": "12"} if codec == "libsvtav1" else {}
    if codec == "libx265":
        options["x265-params"] = "log-level=none"
    with av.open(str(path), "w") as container:
        # The first stream is what counts; further ones are noise to be ignored.
        streams = [container.add_stream(codec, rate=rate, options=options) for _ in range(1 + extra_streams)]
        for number, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
            if codec == "mpeg4":
                stream.bit_rate = 8_000_000
            if times is not None:
                stream.codec_context.time_base = stream.time_base = Fraction(1, 90000)
            if rotation and number == 0:
                stream.set_display_rotation(rotation)
        track = container.add_stream(sound_codec, rate=sound_rate, layout=layout) if sound is not None else None
        for number, stream in enumerate(streams):
            for index, pixels in enumerate(frames if number == 0 else 255 - frames):
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture.time_base = Fraction(1, 90000) if times is not None else 1 / Fraction(rate)
                picture.pts = round(times[index] * 90000) if times is not None else index
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        if track is not None:
            for start in range(0, sound.shape[1], 1024):
                piece = np.ascontiguousarray(sound[:, start : start + 1024])
                block = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
                block.sample_rate = sound_rate
                block.time_base = Fraction(1, sound_rate)
                block.pts = start + round(sound_start * sound_rate)
                container.mux(track.encode(block))
            container.mux(track.encode())
    return path


def make_sound(path: Path, samples: np.ndarray, rate: int, codec: str, layout: str) -> Path:
    """Encode sound (C, S) alone."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=track.format.name, layout=layout, rate=rate)
        for start in range(0, samples.shape[1], 1000):
            piece = np.ascontiguousarray(samples[:, start : start + 1000])
            block = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            block.sample_rate = rate
            block.pts = start
            for converted in resampler.resample(block):
                container.mux(track.encode(converted))
        container.mux(track.encode())
    return path
