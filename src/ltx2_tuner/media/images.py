"""Reading still pictures of every common kind as 8-bit RGB."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ltx2_tuner.media.errors import MediaError, reading


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The picture in `path` as uint8 (H, W, 3), upright.

    EXIF orientation is applied, transparency is dropped (not composited), 16-bit pictures keep their upper 8 bits,
    and of an animation the first frame is read.

    Raises:
        MediaError: missing, damaged, or not a picture.
    """
    path = Path(path)
    _register_plugins(path)
    with reading(path):
        try:
            with Image.open(path) as image:
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
        except Image.DecompressionBombError as error:
            raise MediaError(f"{path}: the picture is too large ({error})") from error


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of a picture after EXIF rotation, from its header alone.

    Raises:
        MediaError: missing, damaged, or not a picture.
    """
    path = Path(path)
    _register_plugins(path)
    with reading(path), Image.open(path) as image:
        width, height = image.size
        # EXIF orientations 5 to 8 swap the axes.
        return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        # Some 16-bit greyscale files open as 32-bit integers; float pictures usually span 0 to 1.
        peak = values.max(initial=0.0)
        scale = 255.0 if image.mode == "F" and peak <= 1 else 1.0 if peak <= 255 else 1 / 256
        return Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _register_plugins(path: Path) -> None:
    """JPEG XL needs a plugin, which registers itself when it is imported."""
    if path.suffix.lower() != ".jxl":
        return
    import importlib

    for name in ("pillow_jxl", "jxlpy.JXLImagePlugin"):
        try:
            importlib.import_module(name)
            return
        except ImportError:
            continue
    raise MediaError(f"{path}: reading JPEG XL needs a plugin; pip install pillow-jxl-plugin")
