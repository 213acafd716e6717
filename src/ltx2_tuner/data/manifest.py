"""The cache-only manifest: train without the sources, on the machine that has nothing but the caches."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path

from ltx2_tuner import __version__
from ltx2_tuner.data import config_checks
from ltx2_tuner.data.config import (
    Dataset,
    DatasetConfig,
    command_line_options,
    dataset_from_options,
    find_input,
    for_mode,
)
from ltx2_tuner.data.options import KINDS, OPTIONS, OUTPUT_DIRECTORIES, SOURCE_KEYS
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_json

FORMAT = "musubi_tuner_dataset_manifest"  # the name in the format that files in circulation have
VERSION = 1
_SOURCE_OPTIONS = (*SOURCE_KEYS, "control_directory", "reference_directory", "reference_audio_directory")


def write_manifest(path: str | Path, config: DatasetConfig, component_ids: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a dataset file.

    Args:
        component_ids: fingerprints of the components that make the caches, by component name.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": "ltx2",
        "generated_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "generator": f"ltx2-tuner {__version__}",
        "source_dataset_config": str(config.path),
        "base_directory": str(Path.cwd()),
        "component_ids": dict(component_ids or {}),
        "datasets": [_entry(dataset) for dataset in config.datasets],
    }
    if config.validation:
        manifest["validation_datasets"] = [_entry(dataset) for dataset in config.validation]
    write_json(path, manifest)


def _entry(dataset: Dataset) -> dict[str, object]:
    """One dataset by TOML names, without its sources."""
    values = {name: _plain(getattr(dataset, name)) for name in OPTIONS if name not in _SOURCE_OPTIONS}
    params = {**values, **dict.fromkeys(_SOURCE_OPTIONS), "cache_only": True, "architecture": "ltx2"}
    return {"dataset_type": dataset.kind, "params": params}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def load_manifest(path: str | Path, mode: str, *, typed: Mapping[str, object] | None = None) -> DatasetConfig:
    """The datasets of a manifest; only their caches are known.

    Args:
        mode: video, av or audio (--ltx2_mode).
        typed: options the user typed on the command line, by their TOML names; the manifest wins over them.

    Raises:
        UserError: with every problem of the file.
    """
    path = Path(path)
    document = _read(path)
    problems = config_checks.Problems(path)
    if document.get("version") != VERSION:
        problems.error(
            f"manifest version {document.get('version')!r} is not {VERSION}; make it again with "
            "ltx2_cache_latents.py --save_dataset_manifest"
        )
    if document.get("architecture", "ltx2") != "ltx2":
        problems.error(f"made for '{document['architecture']}', not for ltx2")
    base = document.get("base_directory")
    folders = [Path(base)] if isinstance(base, str) and "\0" not in base else []
    groups = {}
    for name in ("datasets", "validation_datasets"):
        entries = document.get(name) or []
        if not isinstance(entries, list) or (name == "datasets" and not entries):
            problems.error(f"'{name}' must be a non-empty list")
            entries = []
        built = (
            _dataset(
                entry, f"{name}[{index}]", index, name != "datasets", typed or {}, [*folders, path.parent], problems
            )
            for index, entry in enumerate(entries)
        )
        groups[name] = tuple(dataset for dataset in built if dataset is not None)
    mode = config_checks.resolve_mode(mode, groups["datasets"] + groups["validation_datasets"])
    config = DatasetConfig(path, mode, *(for_mode(group, mode) for group in groups.values()))
    config_checks.check_kinds(config, problems)
    config_checks.check_directories(config.all, problems)
    problems.raise_if_any()
    problems.log()
    return config


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; check --dataset_manifest") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a dataset manifest; make one with ltx2_cache_latents.py --save_dataset_manifest")
    return document


def _dataset(
    entry: object,
    label: str,
    index: int,
    validation: bool,
    typed: Mapping[str, object],
    folders: list[Path],
    problems: config_checks.Problems,
) -> Dataset | None:
    params = entry.get("params") if isinstance(entry, dict) else None
    if not isinstance(params, dict) or entry.get("dataset_type") not in KINDS:
        problems.error(f"{label}: must have a dataset_type ({', '.join(KINDS)}) and params")
        return None
    options = command_line_options(typed)
    for key, value in params.items():
        if key in OPTIONS and key not in _SOURCE_OPTIONS and value is not None:
            try:
                options[key] = OPTIONS[key].parse(value)
            except ValueError as expected:
                problems.error(f"{label}: '{key}' must be {expected}, not {json.dumps(value)}")
    for key in OUTPUT_DIRECTORIES:
        if key in options:
            options[key] = find_input(options[key], *folders)
    if "cache_directory" not in options:
        problems.error(f"{label}: params has no cache_directory")
        return None
    return dataset_from_options(options, entry["dataset_type"], label, index, validation)
