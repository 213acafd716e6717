"""The options of a dataset table: one row each, with the type, the limits and the dataset kinds it is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ltx2_tuner.data.extraction import MODES as EXTRACTION_MODES

KINDS = ("image", "video", "audio")

# Source keys: (kind, whether it is a JSONL file).
SOURCE_KEYS = {
    "image_directory": ("image", False),
    "image_jsonl_file": ("image", True),
    "video_directory": ("video", False),
    "video_jsonl_file": ("video", True),
    "audio_directory": ("audio", False),
    "audio_jsonl_file": ("audio", True),
}

# Keys of other model families that dataset files in circulation hold: accepted, no effect.
FOREIGN_KEYS = frozenset(
    {
        "multiple_target",
        "no_resize_control",
        "control_resolution",
        "fp_latent_window_size",
        "fp_1f_clean_indices",
        "fp_1f_target_index",
        "fp_1f_no_post",
        "flux_kontext_no_resize_control",
        "qwen_image_edit_no_resize_control",
        "qwen_image_edit_control_resolution",
    }
)


@dataclass(frozen=True)
class Option:
    """One option. `parse` returns the checked value or raises ValueError("what was expected")."""

    parse: Callable[[object], object]
    kinds: tuple[str, ...] = KINDS
    default: object = None
    from_command_line: bool = False
    tolerated: tuple[str, ...] = ()  # kinds where it is accepted and has no effect


def _integer(minimum: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"an integer of at least {minimum}")
        return value

    return parse


def _number(words: str, accept: Callable[[float], bool]) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(words)
        if not math.isfinite(value) or not accept(value):
            raise ValueError(words)
        return float(value)

    return parse


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _choice(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return value

    return parse


def text(value: object) -> str:
    """A non-empty string without control characters (no file system takes a NUL)."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    if any(ord(character) < 32 for character in value):
        raise ValueError("a string without control characters")
    return value


def _extension(value: object) -> str:
    name = text(value)
    if any(separator in name for separator in "/\\"):
        raise ValueError("a file extension such as .txt, without a folder")
    return name if name.startswith(".") else f".{name}"


def _resolution(value: object) -> tuple[int, int]:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 64 for side in sides):
        raise ValueError("[width, height] or one integer, each at least 64 pixels")
    return sides[0], sides[1]


def _frame_counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("a non-empty list of integers such as [1, 17, 33]")
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in value):
        raise ValueError("a list of integers, each at least 1")
    return tuple(value)


_positive = _number("a number above 0", lambda value: value > 0)
_weight = _number("a number of at least 0", lambda value: value >= 0)
_decibel = _number("a number of at most 0 (dBFS)", lambda value: value <= 0)

_PICTURES = ("image", "video")
_SOUND = ("video", "audio")

OPTIONS: dict[str, Option] = {
    "resolution": Option(_resolution, default=(960, 544)),
    "caption_extension": Option(_extension, default=".txt"),
    "caption_field": Option(text, default="caption", from_command_line=True),
    "batch_size": Option(_integer(1), default=1),
    "num_repeats": Option(_integer(1), default=1),
    "enable_bucket": Option(_boolean, _PICTURES, default=False, tolerated=("audio",)),
    "bucket_no_upscale": Option(_boolean, _PICTURES, default=False, tolerated=("audio",)),
    "cache_directory": Option(text),
    "video_loss_weight": Option(_weight, from_command_line=True),
    "audio_loss_weight": Option(_weight, from_command_line=True),
    "separate_audio_buckets": Option(_boolean, default=False, from_command_line=True),
    "reference_cache_directory": Option(text, _PICTURES),
    "reference_audio_cache_directory": Option(text, _SOUND),
    "reference_frames": Option(_integer(1), _PICTURES, default=1, from_command_line=True),
    "reference_directory": Option(text, _PICTURES),
    "control_directory": Option(text, _PICTURES),
    "target_frames": Option(_frame_counts, ("video",), default=(1,)),
    "frame_extraction": Option(_choice(*EXTRACTION_MODES), ("video",), default="head"),
    "frame_stride": Option(_integer(1), ("video",), default=1),
    "frame_sample": Option(_integer(1), ("video",), default=1),
    "max_frames": Option(_integer(1), ("video",), default=129),
    "source_fps": Option(_positive, ("video",)),
    "target_fps": Option(_positive, ("video",), default=25.0),
    "reference_follow_crop": Option(_boolean, ("video",), default=True),
    "reference_audio_directory": Option(text, _SOUND),
    "audio_peak_db": Option(_decibel, _SOUND),
    "audio_bucket_strategy": Option(
        _choice("pad", "truncate"), ("audio",), default="pad", from_command_line=True, tolerated=("video",)
    ),
    "audio_bucket_interval": Option(_positive, ("audio",), default=2.0, from_command_line=True, tolerated=("video",)),
}

INPUT_DIRECTORIES = ("reference_directory", "control_directory", "reference_audio_directory")
OUTPUT_DIRECTORIES = ("cache_directory", "reference_cache_directory", "reference_audio_cache_directory")
