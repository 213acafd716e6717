"""What must hold within one dataset, between datasets, and between datasets and the mode."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ltx2_tuner.data.buckets import bucket_list, bucket_step
from ltx2_tuner.data.extraction import round8
from ltx2_tuner.errors import UserError

if TYPE_CHECKING:
    from ltx2_tuner.data.config import Dataset, DatasetConfig

logger = logging.getLogger(__name__)


class Problems:
    """Collects what is wrong with one file: errors to raise together, warnings and notes to log once it is sound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[str] = []
        self._notices: list[tuple[int, str]] = []

    def error(self, message: str) -> None:
        self.errors.append(message)

    def warning(self, message: str) -> None:
        self._notices.append((logging.WARNING, message))

    def info(self, message: str) -> None:
        self._notices.append((logging.INFO, message))

    def raise_if_any(self) -> None:
        """Raises UserError with one line a problem."""
        if not self.errors:
            return
        if len(self.errors) == 1:
            raise UserError(f"{self.path}: {self.errors[0]}")
        lines = "".join(f"\n  {message}" for message in self.errors)
        raise UserError(f"{self.path}: {len(self.errors)} problems to fix{lines}")

    def log(self) -> None:
        for level, message in self._notices:
            logger.log(level, "%s: %s", self.path, message)


def resolve_mode(mode: str, datasets: tuple[Dataset, ...]) -> str:
    """`audio` when there is nothing but sound to train on, else the mode asked for."""
    if mode != "audio" and datasets and all(dataset.kind == "audio" for dataset in datasets):
        logger.info("all datasets are audio datasets: --ltx2_mode %s becomes audio", mode)
        return "audio"
    return mode


def check_conflicts(options: dict[str, object], kind: str, label: str, problems: Problems) -> None:
    """Combinations of options within one dataset; `options` holds what the file sets for it."""
    reference, control = options.get("reference_directory"), options.get("control_directory")
    if reference and control and reference != control:
        problems.error(f"{label}: 'reference_directory' and its alias 'control_directory' differ; keep one")
    if "reference_cache_directory" not in options:
        if reference:
            problems.error(f"{label}: 'reference_directory' needs 'reference_cache_directory'")
        elif control:
            problems.warning(f"{label}: 'control_directory' without 'reference_cache_directory' is ignored")
    if options.get("reference_audio_directory") and "reference_audio_cache_directory" not in options:
        problems.error(f"{label}: 'reference_audio_directory' needs 'reference_audio_cache_directory'")
    if options.get("bucket_no_upscale") and not options.get("enable_bucket") and kind != "audio":
        problems.info(f"{label}: 'bucket_no_upscale' has no effect without enable_bucket = true")
    if kind == "video":
        _check_extraction(options, label, problems)


def _check_extraction(options: dict[str, object], label: str, problems: Problems) -> None:
    mode = options.get("frame_extraction", "head")
    no_effect = {
        "frame_stride": options.get("frame_stride", 1) > 1 and mode != "slide",
        "frame_sample": options.get("frame_sample", 1) > 1 and mode != "uniform",
        "max_frames": "max_frames" in options and mode != "full",
        "target_frames": "target_frames" in options and mode == "full",
    }
    for key, idle in no_effect.items():
        if idle:
            problems.info(f"{label}: '{key}' has no effect with frame_extraction = \"{mode}\"")
    if mode == "uniform" and options.get("frame_sample", 1) == 1:
        problems.warning(f'{label}: frame_extraction = "uniform" with frame_sample = 1 is the same as "head"')
    targets = options.get("target_frames", (1,))
    rounded = sorted({round8(count) for count in targets})
    if mode == "full":
        return
    if rounded != sorted(set(targets)):
        problems.warning(f"{label}: target_frames {list(targets)} became {rounded} (the model takes 8n+1 frames)")
    if mode == "chunk" and 1 in rounded:
        problems.warning(f'{label}: frame_extraction = "chunk" with 1 in target_frames makes every frame an item')


def check_config(config: DatasetConfig, problems: Problems, purpose: str, reference_downscale: int) -> None:
    """Rules between datasets, and between each dataset, the mode and the disk."""
    for dataset in config.all:
        _check_sources(dataset, problems, purpose)
        _check_resolution(dataset, problems, reference_downscale)
    check_kinds(config, problems)
    check_directories(config.all, problems)


def _check_sources(dataset: Dataset, problems: Problems, purpose: str) -> None:
    sources = {
        "source directory": dataset.source_directory,
        "reference_directory": dataset.reference_directory,
        "reference_audio_directory": dataset.reference_audio_directory,
    }
    missing = [f"{name} '{path}' does not exist" for name, path in sources.items() if path and not path.is_dir()]
    if dataset.source_jsonl and not dataset.source_jsonl.is_file():
        missing.append(f"JSONL file '{dataset.source_jsonl}' does not exist")
    for message in missing:
        if purpose == "caching":
            problems.error(f"{dataset.label}: {message}")
        else:
            problems.warning(f"{dataset.label}: {message}; training reads the caches alone")
    if purpose == "caching" and dataset.reference_cache_directory and not dataset.has_reference_source:
        problems.info(f"{dataset.label}: no reference source; reference caching skipped")


def _check_resolution(dataset: Dataset, problems: Problems, reference_downscale: int) -> None:
    if dataset.item_kind == "audio":
        return
    step = bucket_step(dataset.has_reference_source, reference_downscale)
    if dataset.enable_bucket:
        try:
            bucket_list(dataset.resolution, step)
        except UserError as error:
            problems.error(f"{dataset.label}: {error}")
        return
    for name, side in zip(("width", "height"), dataset.resolution):
        if side % step:
            below = side // step * step
            nearest = f"{below} or {below + step}" if below else str(step)
            problems.error(
                f"{dataset.label}: resolution {name} {side} is not a multiple of {step}; use {nearest}, "
                "or set enable_bucket = true"
            )


def check_kinds(config: DatasetConfig, problems: Problems) -> None:
    """Which kinds of dataset a mode takes."""
    kinds = {dataset.kind for dataset in config.all}
    if "audio" in kinds and len(kinds) > 1:
        problems.error(
            "audio datasets can only be trained alone, with --ltx2_mode audio; move them to a dataset file of their own"
        )
        return
    if config.mode != "audio":
        return
    for dataset in config.all:
        if dataset.kind == "image":
            problems.error(f"{dataset.label}: image datasets have no sound; use --ltx2_mode video or av")
        elif dataset.kind == "video" and not (
            dataset.reference_audio_directory or dataset.reference_audio_cache_directory
        ):
            problems.error(
                f"{dataset.label}: in --ltx2_mode audio a video dataset must set reference_audio_directory; "
                "for its sound alone use audio_directory"
            )
        elif dataset.kind == "video":
            problems.info(f"{dataset.label}: in audio mode every file is one item; frame extraction has no effect")


def _normal(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def check_directories(datasets: tuple[Dataset, ...], problems: Problems) -> None:
    """No two datasets may write into the same folder: one would delete or read the other's files."""
    caches = _claims(datasets, "cache_directory")
    references = _claims(datasets, "reference_cache_directory")
    sounds = _claims(datasets, "reference_audio_cache_directory")
    for name, claims in (
        ("cache_directory", caches),
        ("reference_cache_directory", references),
        ("reference_audio_cache_directory", sounds),
    ):
        for folder, labels in claims.items():
            if len(labels) > 1:
                problems.error(f"{', '.join(labels)}: share {name} '{folder}'; give each its own folder")
            if claims is not caches and folder in caches:
                problems.error(
                    f"{', '.join(labels)}: {name} '{folder}' is also the cache_directory of "
                    f"{', '.join(caches[folder])}; give it its own folder"
                )
    _warn_foreign_sources(datasets, problems)


def _claims(datasets: tuple[Dataset, ...], name: str) -> dict[str, list[str]]:
    """Datasets by the folder they write under the option `name`."""
    claims: dict[str, list[str]] = {}
    for dataset in datasets:
        folder = getattr(dataset, name)
        if folder is not None:
            claims.setdefault(_normal(folder), []).append(dataset.label)
    return claims


def _outputs(dataset: Dataset) -> Iterator[Path]:
    for folder in (
        dataset.cache_directory,
        dataset.reference_cache_directory,
        dataset.reference_audio_cache_directory,
    ):
        if folder is not None:
            yield folder


def _warn_foreign_sources(datasets: tuple[Dataset, ...], problems: Problems) -> None:
    for dataset in datasets:
        if dataset.source_directory is None:
            continue
        source = _normal(dataset.source_directory)
        writers = [
            other.label
            for other in datasets
            if other is not dataset and any(_normal(folder) == source for folder in _outputs(other))
        ]
        if writers:
            problems.warning(
                f"{', '.join(writers)}: writes caches into '{dataset.source_directory}', the source of {dataset.label}"
            )
