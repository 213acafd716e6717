"""Prompt files: what to generate, one sample a line, table or object."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tomllib
from pathlib import Path

from ltx2_tuner.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff", ".gif")
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus")
MEDIA_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *_VIDEOS, *_SOUNDS))


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """One sample; None means the run's default.

    `width`, `height` in pixels, `frame_count` in frames, `frame_rate` in frames per second.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    frame_count: int | None = None
    frame_rate: float | None = None
    seed: int | None = None
    sample_steps: int | None = None
    guidance_scale: float | None = None
    cfg_scale: float | None = None
    image_path: str | None = None
    v2v_ref_path: str | None = None
    ref_audio_path: str | None = None


# Option letters of a text line -> key of the TOML and JSON forms.
OPTIONS = {
    "w": "width",
    "h": "height",
    "f": "frame_count",
    "d": "seed",
    "s": "sample_steps",
    "g": "guidance_scale",
    "l": "cfg_scale",
    "fs": "discrete_flow_shift",
    "fr": "frame_rate",
    "n": "negative_prompt",
    "i": "image_path",
    "v": "v2v_ref_path",
    "ra": "ref_audio_path",
    "cn": "control_video_path",
    "ci": "control_image_path",
    "ei": "end_image_path",
    "of": "one_frame",
}
_ALIASES = {
    "num_frames": "frame_count",
    "reference_audio_path": "ref_audio_path",
    "control_video_path": "v2v_ref_path",
    "control_image_path": "v2v_ref_path",
}
_WITHOUT_EFFECT = {"discrete_flow_shift"}
_OF_OTHER_MODELS = {"end_image_path", "one_frame"}
_INTEGERS = {"width", "height", "frame_count", "seed", "sample_steps"}
_FLOATS = {"frame_rate", "guidance_scale", "cfg_scale"}
_PATHS = {"image_path", "v2v_ref_path", "ref_audio_path"}
_KEYS = frozenset(field.name for field in dataclasses.fields(SamplePrompt)) | _ALIASES.keys() | _WITHOUT_EFFECT
_OPTION_START = re.compile(r"(?:^|(?<=\s))--([A-Za-z]+)(?=\s|$)")


def read_prompts(path: str | Path) -> list[SamplePrompt]:
    """The samples of a `.txt`, `.toml` or `.json` prompt file, in file order.

    Raises:
        UserError: the file is missing, not UTF-8, empty, or an option's value does not parse (named with its place).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--sample_prompts {path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--sample_prompts {path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"--sample_prompts {path}: cannot be read ({error.strerror})") from None
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"--sample_prompts {path}: the name must end in .txt, .toml or .json")
    prompts = readers[path.suffix.lower()](path, text)
    if not prompts:
        raise UserError(f"--sample_prompts {path}: holds no prompt")
    return prompts


def parse_line(line: str, place: str = "prompt") -> SamplePrompt:
    """One line of a text prompt file: the prompt with options such as `--w 768`, before or after it.

    A path option that comes before the prompt takes a quoted string, the words up to a known media suffix, or one
    word; what follows is the prompt. After the prompt a path takes everything up to the next option.
    """
    starts = list(_OPTION_START.finditer(line))
    prompt = line[: starts[0].start()].strip() if starts else line.strip()
    values: dict[str, object] = {}
    for start, following in zip(starts, [*starts[1:], None]):
        letter = start.group(1).lower()
        segment = line[start.end() : following.start() if following else len(line)].strip()
        key = OPTIONS.get(letter)
        if key is None:
            logger.warning("%s: unknown option --%s is ignored", place, letter)
            continue
        if _ALIASES.get(key, key) in _PATHS and not prompt:
            segment, prompt = _leading_path(segment)
        elif key != "negative_prompt" and not prompt and " " in segment:
            segment, prompt = segment.split(None, 1)
        values[key] = segment
    values["prompt"] = prompt
    return _sample(values, place)


def _leading_path(segment: str) -> tuple[str, str]:
    """Split `path rest of the prompt` (spec 05 section 10, rule 3)."""
    if segment[:1] in {'"', "'"} and (end := segment.find(segment[0], 1)) > 0:
        return segment[: end + 1], segment[end + 1 :].strip()
    words = segment.split(" ")
    for count in range(1, len(words) + 1):
        candidate = " ".join(words[:count])
        if Path(candidate).suffix.lower() in MEDIA_SUFFIXES:
            return candidate, " ".join(words[count:]).strip()
    return words[0], " ".join(words[1:]).strip()


def _sample(values: dict[str, object], place: str) -> SamplePrompt:
    fields: dict[str, object] = {}
    for given, value in values.items():
        key = _ALIASES.get(given, given)
        if given in _OF_OTHER_MODELS:
            logger.warning("%s: %s has no counterpart in LTX-2 and is ignored", place, given)
        elif key in _WITHOUT_EFFECT or value is None:
            continue
        elif key in _INTEGERS:
            fields[key] = _number(int, key, value, place)
        elif key in _FLOATS:
            fields[key] = _number(float, key, value, place)
        elif key in _PATHS:
            fields[key] = str(value).strip().strip("\"'")
        else:
            fields[key] = str(value)
    if "sample_steps" in fields:
        fields["sample_steps"] = min(max(fields["sample_steps"], 1), 1000)
    for key in ("width", "height", "frame_count", "frame_rate"):
        if key in fields and fields[key] <= 0:
            raise UserError(f"{place}: {key} must be above 0 (got {fields[key]})")
    return SamplePrompt(**fields)


def _number(kind: type, key: str, value: object, place: str) -> int | float:
    words = str(value).split()
    try:
        return kind(words[0])
    except (ValueError, IndexError):
        raise UserError(f"{place}: {key} needs a number, found '{value}'") from None


def _read_text(path: Path, text: str) -> list[SamplePrompt]:
    return [
        parse_line(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_toml(path: Path, text: str) -> list[SamplePrompt]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--sample_prompts {path}: is not valid TOML: {error}") from None
    table = document.get("prompt")
    if not isinstance(table, dict):
        raise UserError(f"--sample_prompts {path}: needs a [prompt] table with [[prompt.subset]] entries")
    common = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    return [
        _checked({**common, **subset}, f"{path}, [[prompt.subset]] {number}")
        for number, subset in enumerate(subsets, start=1)
    ]


def _read_json(path: Path, text: str) -> list[SamplePrompt]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--sample_prompts {path}: is not valid JSON: {error}") from None
    if not isinstance(document, list):
        raise UserError(f"--sample_prompts {path}: must hold a list of prompts")
    samples = []
    for number, entry in enumerate(document):
        place = f"{path}, entry {number}"
        if isinstance(entry, str):
            samples.append(parse_line(entry, place))
        elif isinstance(entry, dict):
            samples.append(_checked(entry, place))
        else:
            raise UserError(f"{place}: must be a string or an object, found {type(entry).__name__}")
    return samples


def _checked(values: dict[str, object], place: str) -> SamplePrompt:
    for key in values:
        if key not in _KEYS and key not in _OF_OTHER_MODELS:
            raise UserError(f"{place}: unknown key '{key}'{did_you_mean(key, _KEYS)}")
    return _sample(values, place)
