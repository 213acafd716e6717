"""The dataset file: reading it, inheritance, and the frozen records everything else works with.

All mistakes of one file are reported together, in one error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ltx2_tuner.data import config_checks
from ltx2_tuner.data.extraction import round8
from ltx2_tuner.data.options import FOREIGN_KEYS, INPUT_DIRECTORIES, OPTIONS, OUTPUT_DIRECTORIES, SOURCE_KEYS, text
from ltx2_tuner.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

_TOP_LEVEL = ("general", "datasets", "validation_datasets")
DEFAULT_FPS = 25.0  # what the model is told for pictures and sound files


@dataclass(frozen=True)
class Dataset:
    """One dataset after inheritance. Options of other kinds hold their defaults.

    kind: image, video or audio, from the source key. item_kind: what its items are, which differs for a video dataset
    in audio mode (every file is one audio item). source_directory / source_jsonl: one of them, or neither for a
    dataset that came from a manifest. resolution: (width, height) pixels. Loss weights: None = the trainer's own.
    """

    label: str
    index: int
    validation: bool
    kind: str
    item_kind: str
    source_directory: Path | None
    source_jsonl: Path | None
    cache_directory: Path
    resolution: tuple[int, int]
    caption_extension: str
    caption_field: str
    batch_size: int
    num_repeats: int
    enable_bucket: bool
    bucket_no_upscale: bool
    video_loss_weight: float | None
    audio_loss_weight: float | None
    separate_audio_buckets: bool
    reference_directory: Path | None
    reference_cache_directory: Path | None
    reference_frames: int
    reference_follow_crop: bool
    reference_audio_directory: Path | None
    reference_audio_cache_directory: Path | None
    target_frames: tuple[int, ...]
    frame_extraction: str
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | None
    target_fps: float
    audio_peak_db: float | None
    audio_bucket_strategy: str
    audio_bucket_interval: float

    @property
    def cache_only(self) -> bool:
        """Whether only the caches are known (the dataset came from a manifest)."""
        return self.source_directory is None and self.source_jsonl is None

    @property
    def has_reference_source(self) -> bool:
        """Whether reference pictures or clips can be cached: a folder, or a JSONL file that may name them."""
        source = self.reference_directory or self.source_jsonl
        return source is not None and self.reference_cache_directory is not None

    @property
    def has_reference_audio_source(self) -> bool:
        """Whether reference sound can be cached: a folder, or a JSONL file that may name it."""
        source = self.reference_audio_directory or self.source_jsonl
        return source is not None and self.reference_audio_cache_directory is not None

    @property
    def model_fps(self) -> float:
        """Frames per second the model is told for items of this dataset."""
        return self.target_fps if self.item_kind == "video" else DEFAULT_FPS


@dataclass(frozen=True)
class DatasetConfig:
    """All datasets of a file (or manifest). `mode` is video, av or audio, after the switch for audio-only files."""

    path: Path
    mode: str
    datasets: tuple[Dataset, ...]
    validation: tuple[Dataset, ...] = ()

    @property
    def all(self) -> tuple[Dataset, ...]:
        """Training datasets, then validation datasets."""
        return self.datasets + self.validation


def load_dataset_config(
    path: str | Path,
    mode: str,
    *,
    purpose: str = "caching",
    typed: Mapping[str, object] | None = None,
    reference_downscale: int = 1,
) -> DatasetConfig:
    """Read a .toml or .json dataset file.

    Args:
        mode: video, av or audio (--ltx2_mode).
        purpose: "caching" (sources must exist) or "training" (only caches are read).
        typed: options the user typed on the command line, by their TOML names; the file wins over them.
        reference_downscale: --reference_downscale, which decides what resolutions are legal.

    Raises:
        UserError: with every problem of the file.
    """
    path = Path(path)
    document = _read_document(path)
    problems = config_checks.Problems(path)
    _check_top_level(document, problems)
    general = document.get("general", {})
    general = general if isinstance(general, dict) else {}
    _warn_foreign_keys(path, document)
    reader = _DatasetReader(path, _parse_table(general, "general", problems), typed or {}, problems)
    groups = {}
    for name in ("datasets", "validation_datasets"):
        built = (
            reader.read(table, f"{name}[{index}]", index, validation=name != "datasets")
            for index, table in enumerate(_tables(document, name))
        )
        groups[name] = tuple(dataset for dataset in built if dataset is not None)
    datasets, validation = groups["datasets"], groups["validation_datasets"]
    mode = config_checks.resolve_mode(mode, datasets + validation)
    config = DatasetConfig(path, mode, *(for_mode(group, mode) for group in (datasets, validation)))
    config_checks.check_config(config, problems, purpose, reference_downscale)
    problems.raise_if_any()
    problems.log()
    return config


def dataset_from_options(
    options: Mapping[str, object], kind: str, label: str, index: int, validation: bool, **paths: Path | None
) -> Dataset:
    """A dataset from checked option values; missing ones take their defaults. `paths` replaces path options."""
    names = {field.name for field in dataclasses.fields(Dataset)}
    values = {name: options.get(name, option.default) for name, option in OPTIONS.items() if name in names}
    values |= {"source_directory": None, "source_jsonl": None} | paths
    values["target_frames"] = tuple(sorted({round8(count) for count in values["target_frames"]}))
    return Dataset(label=label, index=index, validation=validation, kind=kind, item_kind=kind, **values)


def _read_document(path: Path) -> dict:
    """The parsed file, a mapping."""
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"{path}: a dataset file ends in .toml or .json")
    try:
        content = path.read_text(encoding="utf-8-sig")
        document = tomllib.loads(content) if path.suffix.lower() == ".toml" else json.loads(content)
    except FileNotFoundError:
        raise UserError(f"{path}: no such dataset file; check --dataset_config") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: the top level must be a table with [[datasets]] entries")
    return document


def _check_top_level(document: dict, problems: config_checks.Problems) -> None:
    for key in document:
        if key not in _TOP_LEVEL:
            problems.error(f"unknown top-level key '{key}'{did_you_mean(key, _TOP_LEVEL)}")
    if not isinstance(document.get("general", {}), dict):
        problems.error("[general] must be a table")
    for name in ("datasets", "validation_datasets"):
        if not isinstance(document.get(name, []), list):
            problems.error(f"'{name}' must be an array of tables: write [[{name}]]")
    if not document.get("datasets"):
        problems.error("no [[datasets]] entry; add one with a source such as video_directory")


def _tables(document: dict, name: str) -> list:
    """The entries of an array of tables; empty when it is none."""
    tables = document.get(name, [])
    return tables if isinstance(tables, list) else []


def _warn_foreign_keys(path: Path, document: dict) -> None:
    tables = [document.get("general"), *(table for name in _TOP_LEVEL[1:] for table in _tables(document, name))]
    found = sorted({key for table in tables if isinstance(table, dict) for key in table if key in FOREIGN_KEYS})
    if found:
        logger.warning("%s: ignored, options of other models: %s", path, ", ".join(found))


def _parse_table(table: dict, label: str, problems: config_checks.Problems) -> dict[str, object]:
    """Checked option values of one table, without the source keys."""
    values = {}
    for key, value in table.items():
        if key in SOURCE_KEYS or key in FOREIGN_KEYS:
            if label == "general" and key in SOURCE_KEYS:
                problems.error(f"general: '{key}' belongs in a [[datasets]] entry, not in [general]")
        elif key not in OPTIONS:
            problems.error(f"{label}: unknown key '{key}'{did_you_mean(key, [*OPTIONS, *SOURCE_KEYS])}")
        else:
            try:
                values[key] = OPTIONS[key].parse(value)
            except ValueError as expected:
                problems.error(f"{label}: '{key}' must be {expected}, not {json.dumps(value, default=str)}")
    return values


@dataclass(frozen=True)
class _DatasetReader:
    """Makes datasets of the tables of one file. general: checked [general] options; typed: flags of the user."""

    path: Path
    general: Mapping[str, object]
    typed: Mapping[str, object]
    problems: config_checks.Problems

    def read(self, table: object, label: str, index: int, validation: bool) -> Dataset | None:
        """One dataset after inheritance, or None when it has no usable source key."""
        if not isinstance(table, dict):
            self.problems.error(f"{label}: must be a table")
            return None
        own = _parse_table(table, label, self.problems)
        source = self._source(table, label)
        if source is None:
            return None
        kind, paths = source
        self._check_kinds(own, kind, label)
        chosen = {key: value for key, value in self.general.items() if kind in OPTIONS[key].kinds} | own
        config_checks.check_conflicts(chosen, kind, label, self.problems)
        flags = command_line_options(self.typed)
        options = self._with_paths(flags | chosen, paths, label)
        return dataset_from_options(options, kind, label, index, validation, **paths)

    def _source(self, table: dict, label: str) -> tuple[str, dict[str, Path]] | None:
        """The kind and the source path field of a dataset table."""
        present = [key for key in SOURCE_KEYS if key in table]
        if not present:
            self.problems.error(f"{label}: no source; add one of {', '.join(SOURCE_KEYS)}")
            return None
        if len(present) > 1:
            self.problems.error(f"{label}: several sources ({', '.join(present)}); keep one")
            return None
        (key,) = present
        try:
            source = find_input(text(table[key]), self.path.parent)
        except ValueError as expected:
            self.problems.error(f"{label}: '{key}' must be {expected}, not {json.dumps(table[key], default=str)}")
            return None
        kind, is_jsonl = SOURCE_KEYS[key]
        return kind, {"source_jsonl" if is_jsonl else "source_directory": source}

    def _check_kinds(self, own: Mapping[str, object], kind: str, label: str) -> None:
        """Options that another kind of dataset has."""
        for key in own:
            option = OPTIONS[key]
            if kind in option.kinds:
                continue
            if kind in option.tolerated:
                self.problems.info(f"{label}: '{key}' has no effect on {kind} datasets")
                continue
            owners = " and ".join(option.kinds)
            article = "an" if kind[0] in "aeiou" else "a"
            self.problems.error(
                f"{label}: '{key}' is an option of {owners} datasets but this is {article} {kind} dataset"
            )

    def _with_paths(self, options: dict[str, object], paths: Mapping[str, Path], label: str) -> dict[str, object]:
        """Options with folders resolved, the alias taken and the default cache directory filled in."""
        options = dict(options)
        for key in INPUT_DIRECTORIES:
            if key in options:
                options[key] = find_input(options[key], self.path.parent)
        if "reference_directory" not in options and "reference_cache_directory" in options:
            options["reference_directory"] = options.get("control_directory")
        if "cache_directory" not in options and "source_jsonl" in paths:
            self.problems.error(f"{label}: a JSONL dataset needs cache_directory")
        options.setdefault("cache_directory", paths.get("source_directory") or self.path.parent)
        for key in OUTPUT_DIRECTORIES:
            if key in options:
                options[key] = Path(options[key]).expanduser()
        return options


def command_line_options(typed: Mapping[str, object]) -> dict[str, object]:
    """The flags among `typed` that may set dataset options."""
    return {key: value for key, value in typed.items() if value is not None and OPTIONS[key].from_command_line}


def find_input(name: str, *folders: Path) -> Path:
    """An existing path below the working directory or one of `folders`, in that order; else the first candidate."""
    wanted = Path(name).expanduser()
    candidates = [wanted, *(folder / wanted for folder in folders)]
    # os.path.exists, because Path.exists raises on names that are too long.
    return next((candidate for candidate in candidates if os.path.exists(candidate)), wanted)  # noqa: PTH110


def for_mode(datasets: tuple[Dataset, ...], mode: str) -> tuple[Dataset, ...]:
    """The datasets as a mode sees them: in audio mode every file of a video dataset is one audio item."""
    if mode != "audio":
        return datasets
    return tuple(dataclasses.replace(dataset, item_kind="audio") for dataset in datasets)
