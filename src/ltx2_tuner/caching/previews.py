"""--debug_mode: shows what would be encoded, without any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ltx2_tuner.caching.decoding import CRASHED, Failed, PictureJob, decode_pictures
from ltx2_tuner.caching.workers import Workers
from ltx2_tuner.data.cache_names import LATENT_SUFFIX
from ltx2_tuner.data.config import Dataset
from ltx2_tuner.data.items import Item
from ltx2_tuner.errors import UserError
from ltx2_tuner.media.resize import cover_crop
from ltx2_tuner.media.write import write_image, write_video

logger = logging.getLogger(__name__)

DEBUG_FOLDER = "debug"
_RAMP = " .:-=+*#%@"
_BACKGROUNDS = {
    name: f"\x1b[{40 + index}m"
    for index, name in enumerate(("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"))
}

# An item and its frames, uint8 (N, H, W, 3).
Preview = tuple[Item, np.ndarray]


def decoded_items(items: Sequence[Item], workers: Workers) -> Iterator[Preview]:
    """The pictures of items as the encoder would get them; what cannot be decoded is logged and left out."""
    jobs = {}
    for item in items:
        job = PictureJob(item.source.path, item.source.form, item.bucket, item.rate, ((item.start, item.frames),))
        jobs[job] = item
    for job, piece in workers.stream(decode_pictures, jobs, lambda job: Failed(CRASHED)):
        if isinstance(piece, Failed):
            logger.error("%s", piece.reason)
        else:
            yield jobs[job], piece[1]


def write_previews(dataset: Dataset, previews: Iterator[Preview]) -> None:
    """--debug_mode video: a clip (or .jpg of one frame) of every item in the folder `debug` of the cache."""
    for item, frames in previews:
        path = dataset.cache_directory / DEBUG_FOLDER / item.latent_path.name.removesuffix(LATENT_SUFFIX)
        path = Path(f"{path}.jpg" if len(frames) == 1 else f"{path}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(frames) == 1:
            write_image(path, frames[0])
        else:
            write_video(path, frames, item.rate.target)
        print(path)


def print_previews(
    previews: Iterator[Preview],
    width: int = 80,
    background: str | None = None,
    limit: int | None = None,
    ask: Callable[[str], str] = input,
) -> None:
    """--debug_mode console: the first frame of each item in characters.

    Args:
        width: columns. background: name of a terminal colour.
        limit: items to show without asking; None waits for a key after each (q ends the dataset).

    Raises:
        UserError: no such colour.
    """
    if background is not None and background.lower() not in _BACKGROUNDS:
        raise UserError(f"--console_back {background}: no such colour; use one of {', '.join(_BACKGROUNDS)}")
    start, end = (_BACKGROUNDS[background.lower()], "\x1b[0m") if background else ("", "")
    for number, (item, frames) in enumerate(previews, 1):
        print(f"{item.key}: {len(frames)} frames of {item.bucket[0]}x{item.bucket[1]}")
        for line in ascii_lines(frames[0], width):
            print(f"{start}{line}{end}")
        if limit is None:
            if ask("Enter: next, q: next dataset ").strip().lower() == "q":
                return
        elif number >= limit:
            return


def ascii_lines(picture: np.ndarray, width: int) -> list[str]:
    """A picture (H, W, 3) in lines of `width` characters, dark to light; a character is twice as high as wide."""
    height = max(round(width * picture.shape[0] / picture.shape[1] / 2), 1)
    grey = cover_crop(picture, width, height).mean(axis=2)
    levels = (grey / 256 * len(_RAMP)).astype(int)
    return ["".join(_RAMP[level] for level in row) for row in levels]


def show_previews(previews: Iterator[Preview]) -> bool:
    """--debug_mode image: a window an item. Returns False when the user quits (q); d goes to the next dataset.

    Raises:
        UserError: OpenCV with windows is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "--debug_mode image needs OpenCV: pip install opencv-python, or use video or console"
        ) from error
    try:
        for item, frames in previews:
            for frame in frames:
                cv2.imshow(item.key, frame[..., ::-1])
                key = cv2.waitKey(0) & 0xFF
                if key in (ord("q"), ord("d")):
                    return key == ord("d")
            cv2.destroyWindow(item.key)
    except cv2.error as error:
        raise UserError("--debug_mode image: this OpenCV cannot open windows here; use video or console") from error
    finally:
        cv2.destroyAllWindows()
    return True
