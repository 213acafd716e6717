"""The slider TOML: which direction is learned, and from what."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ltx2_tuner.errors import UserError, did_you_mean

MODES = ("text", "reference")
DEFAULT_RANGE = (-2.0, -1.0, 0.0, 1.0, 2.0)
_SHARED_KEYS = ("mode", "guidance_strength", "sample_slider_range", "frame_rate")
_KEYS = {
    "text": (*_SHARED_KEYS, "targets"),
    "reference": (*_SHARED_KEYS, "pos_cache_dir", "neg_cache_dir", "text_cache_dir"),
}
_TARGET_KEYS = ("positive", "negative", "target_class", "weight")


@dataclass(frozen=True)
class SliderTarget:
    """One direction in words. target_class: the prompt that is trained on, "" for all content."""

    positive: str
    negative: str
    target_class: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class SliderConfig:
    """What a slider file says. guidance: factor of the direction. multipliers: of the previews. fps: told to the model.

    targets are of mode text; the directories of mode reference (positive, negative, text).
    """

    path: Path
    mode: str
    guidance: float = 1.0
    multipliers: tuple[float, ...] = DEFAULT_RANGE
    fps: float = 25.0
    targets: tuple[SliderTarget, ...] = ()
    positive_cache: Path | None = None
    negative_cache: Path | None = None
    text_cache: Path | None = None

    def facts(self) -> dict[str, object]:
        """What a saved LoRA says about its slider, by `ss_` key without that prefix."""
        facts: dict[str, object] = {"slider_mode": self.mode, "slider_guidance_strength": self.guidance}
        if self.targets:
            facts["slider_targets"] = [vars(target) for target in self.targets]
        return facts


def load_slider_config(path: str | Path) -> SliderConfig:
    """Read a slider file.

    Raises:
        UserError: with every problem of the file.
    """
    path = Path(path)
    document = _read(path)
    problems: list[str] = []
    mode = document.get("mode")
    if mode not in MODES:
        raise UserError(f"{path}: mode must be one of {', '.join(MODES)}, not {mode!r}")
    for key in document.keys() - set(_KEYS[mode]):
        other = next((name for name in MODES if key in _KEYS[name]), None)
        hint = f", it belongs to mode {other}" if other else did_you_mean(key, _KEYS[mode])
        problems.append(f"unknown key '{key}'{hint}")
    config = SliderConfig(
        path,
        mode,
        guidance=_number(document, "guidance_strength", 1.0, problems),
        multipliers=_range(document, problems),
        fps=_number(document, "frame_rate", 25.0, problems, above=0.0),
        targets=_targets(document, problems) if mode == "text" else (),
        **(_folders(path, document, problems) if mode == "reference" else {}),
    )
    if problems:
        raise UserError(f"{path}: " + "; ".join(sorted(problems)))
    return config


def parse_range(value: object) -> tuple[float, ...]:
    """Preview multipliers from a number, a list of numbers or "a,b,c".

    Raises:
        ValueError: none of these, or a value that is not finite.
    """
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list) or not value or any(isinstance(item, bool) for item in value):
        raise ValueError(value)
    try:
        multipliers = tuple(float(item) for item in value)
    except TypeError:
        raise ValueError(value) from None
    if not all(math.isfinite(multiplier) for multiplier in multipliers):
        raise ValueError(value)
    return tuple(dict.fromkeys(multipliers))


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--slider_config {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--slider_config {path}: cannot be read as TOML ({error}); correct it") from error


def _number(table: dict, key: str, default: float, problems: list[str], above: float | None = None) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problems.append(f"'{key}' must be a finite number, not {value!r}")
        return default
    if above is not None and value <= above:
        problems.append(f"'{key}' must be above {above:g}, not {value}")
    return float(value)


def _range(document: dict, problems: list[str]) -> tuple[float, ...]:
    if "sample_slider_range" not in document:
        return DEFAULT_RANGE
    try:
        return parse_range(document["sample_slider_range"])
    except ValueError:
        problems.append(f"'sample_slider_range' must be a list of numbers, not {document['sample_slider_range']!r}")
        return DEFAULT_RANGE


def _targets(document: dict, problems: list[str]) -> tuple[SliderTarget, ...]:
    tables = document.get("targets")
    if not isinstance(tables, list) or not tables:
        problems.append("mode text needs at least one [[targets]] entry with positive and negative")
        return ()
    targets = []
    for index, table in enumerate(tables):
        label = f"targets[{index}]"
        if not isinstance(table, dict):
            problems.append(f"{label} must be a table")
            continue
        for key in table.keys() - set(_TARGET_KEYS):
            problems.append(f"{label}: unknown key '{key}'{did_you_mean(key, _TARGET_KEYS)}")
        texts = {key: table.get(key, "") for key in _TARGET_KEYS[:3]}
        for key, text in texts.items():
            if not isinstance(text, str) or (key != "target_class" and not text.strip()):
                problems.append(f"{label}: '{key}' must be a text")
        weight = _number({f"{label}: weight": table.get("weight", 1.0)}, f"{label}: weight", 1.0, problems, above=0.0)
        targets.append(SliderTarget(**texts, weight=weight))
    return tuple(targets)


def _folders(path: Path, document: dict, problems: list[str]) -> dict[str, Path | None]:
    folders: dict[str, Path | None] = {}
    for field, key in (
        ("positive_cache", "pos_cache_dir"),
        ("negative_cache", "neg_cache_dir"),
        ("text_cache", "text_cache_dir"),
    ):
        value = document.get(key, document.get("pos_cache_dir") if key == "text_cache_dir" else None)
        if not isinstance(value, str) or not value:
            if key != "text_cache_dir" or key in document:
                problems.append(f"'{key}' must name a folder of caches")
            folders[field] = None
            continue
        folder = Path(value).expanduser()
        beside = path.parent / folder
        folders[field] = folder if folder.is_dir() or not beside.is_dir() else beside
        if not folders[field].is_dir():
            problems.append(f"'{key}': there is no folder {value}")
    return folders
