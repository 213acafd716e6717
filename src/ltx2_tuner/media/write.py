"""Writing clips, sound and pictures, whole or not at all."""

from __future__ import annotations

import os
import wave
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ltx2_tuner.files import atomic_write
from ltx2_tuner.media.audio import to_stereo

CRF = 18
# Rec. 709, limited range, as ffmpeg numbers them: what players assume for untagged files of this size anyway.
_BT709 = 1
_LIMITED = 1


def write_video(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    fps: float,
    audio: tuple[np.ndarray, int] | None = None,
    comment: str | None = None,
) -> None:
    """Write an H.264 clip (yuv420p, CRF 18), with AAC sound of the same length when `audio` is given.

    Args:
        frames: uint8 (N, H, W, 3) or an iterable of (H, W, 3); even width and height.
        fps: frames/s.
        audio: float32 (C, S) in [-1, 1] and its rate in Hz. Cut or padded with silence to the picture's length.
        comment: text that players and tools show as the file's comment.

    Raises:
        ValueError: no frame, or an odd width or height.
    """
    import av

    rate = Fraction(fps).limit_denominator(100_000)
    count = 0
    with atomic_write(path) as file, av.open(file, "w", format=_container_format(path)) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=audio[1], layout="stereo") if audio else None
        for pixels in frames:
            height, width = pixels.shape[:2]
            if count == 0:
                if width % 2 or height % 2:
                    raise ValueError(f"width and height must be even, got {width}x{height}")
                stream.width, stream.height = width, height
                _tag_colours(stream.codec_context)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            picture.pts = count
            picture.time_base = 1 / rate
            container.mux(stream.encode(picture))
            count += 1
        if not count:
            raise ValueError(f"{path}: no frames to write")
        container.mux(stream.encode())
        if sound is not None:
            _encode_sound(container, sound, audio[0], audio[1], round(count / rate * audio[1]))


def write_wav(path: str | os.PathLike, samples: np.ndarray, rate: int) -> None:
    """Write 16-bit stereo PCM; mono is duplicated, more than two channels are cut to two.

    Args:
        samples: float32 (C, S) in [-1, 1]; values outside are clipped.
        rate: samples/s.
    """
    stereo = np.repeat(samples, 2, axis=0) if samples.shape[0] == 1 else samples[:2]
    values = np.trunc(np.clip(stereo, -1, 1) * 32767).astype("<i2")
    with atomic_write(path) as file, wave.open(file, "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(np.ascontiguousarray(values.T).tobytes())


def write_image(path: str | os.PathLike, pixels: np.ndarray, comment: str | None = None) -> None:
    """Write a picture, uint8 (H, W, 3), in the format its suffix names; a PNG file keeps `comment`."""
    path = Path(path)
    format_name = Image.registered_extensions()[path.suffix.lower()]
    options: dict[str, object] = {"quality": 95} if format_name == "JPEG" else {}
    if comment and format_name == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("comment", comment)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format=format_name, **options)


def _container_format(path: str | os.PathLike) -> str:
    return {".mkv": "matroska", ".mov": "mov"}.get(Path(path).suffix.lower(), "mp4")


def _tag_colours(context) -> None:
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED


def _encode_sound(container, stream, samples: np.ndarray, rate: int, length: int) -> None:
    import av

    planes = np.zeros((2, length), dtype=np.float32)
    stereo = to_stereo(np.asarray(samples, dtype=np.float32))[:, :length]
    planes[:, : stereo.shape[1]] = np.clip(stereo, -1, 1)
    block = 1024  # samples of one AAC frame
    for start in range(0, length, block):
        piece = np.ascontiguousarray(planes[:, start : start + block])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
        frame.sample_rate = rate
        frame.pts = start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
