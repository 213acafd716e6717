"""The metadata of cache files, and whether an existing file still fits what would be written now."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltx2_tuner.data.items import Item

# What makes a member stale when it differs; a key that the file lacks is unknown and never counts.
_REASONS = {
    "source_size": "the source file changed",
    "source_mtime_ns": "the source file changed",
    "target_fps": "target_fps changed",
    "bucket": "the bucket changed",
    "crop_start": "the window moved",
    "frame_count": "the frame count changed",
    "reference_frames": "reference_frames changed",
    "reference_downscale": "reference_downscale changed",
    "caption1": "the caption changed",
    "ltx_mode": "made for another mode",
    "ltx_version": "made for another model version",
    "component_id": "made with another checkpoint",
    "gemma_id": "made with another Gemma",
    "preprocess": "settings changed",
}


def canonical_json(values: Mapping[str, object]) -> str:
    """JSON with sorted keys and no spaces: equal settings give equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def source_metadata(source: Path, cache_directory: Path) -> dict[str, str]:
    """Where a source file lies, seen from the cache, and how to notice that it changed.

    Folders of frames have no size and time of their own.
    """
    try:
        relative = Path(os.path.relpath(source.resolve(), cache_directory.resolve())).as_posix()
        entries = {"source_path": relative, "source_path_format": "relative_to_cache"}
    except ValueError:  # another drive
        entries = {"source_path": source.name, "source_path_format": "filename_only"}
    if source.is_file():
        status = source.stat()
        entries |= {"source_size": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}
    return entries


def stale_reason(found: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Why a file with the metadata `found` must be made again, or None when it fits `expected`.

    A key that either side lacks is unknown and never makes a file stale.
    """
    for key, reason in _REASONS.items():
        old, new = found.get(key), expected.get(key)
        if old is None or new is None or str(old) == str(new):
            continue
        if key == "target_fps" and _same_number(str(old), str(new)):
            continue
        if key == "preprocess":
            difference = setting_changes(str(old), str(new))
            if difference:
                return f"{reason}: {difference}"
        elif key in ("source_size", "source_mtime_ns", "caption1"):
            return reason
        else:
            return f"{reason} ({old} -> {new})"
    return None


def setting_changes(old: str, new: str) -> str:
    """`name old -> new` for every setting that two `preprocess` texts both hold and that differs; empty when none."""
    try:
        before, after = json.loads(old), json.loads(new)
        keys = sorted(key for key in before.keys() & after.keys() if before[key] != after[key])
    except (ValueError, AttributeError):
        return "not readable in the file"
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in keys)


def _same_number(old: str, new: str) -> bool:
    try:
        return float(old) == float(new)
    except ValueError:
        return False


def latent_metadata(item: Item, *, component_id: str, preprocess: Mapping[str, object]) -> dict[str, str]:
    """Metadata of an item's latent file (for sound items the caller adds the frame count)."""
    width, height = item.name_size
    entries = {
        "width": str(width),
        "height": str(height),
        "bucket": f"{item.bucket[0]}x{item.bucket[1]}",
        "component_id": component_id,
        "preprocess": canonical_json(preprocess),
        **source_metadata(item.source.path, item.latent_path.parent),
    }
    if item.kind == "video":
        entries |= {
            "frame_count": str(item.frames),
            "target_fps": str(item.rate.target),
            "duration_seconds": str(item.frames / item.rate.target),
            "crop_start": str(item.start),
            "source_fps": "" if item.rate.source is None else str(item.rate.source),
        }
    return entries


def audio_metadata(
    item: Item, *, component_id: str, preprocess: Mapping[str, object], seconds: float | None = None
) -> dict[str, str]:
    """Metadata of an item's sound latent file; `seconds` is the length of the waveform, where it is known already."""
    length = {} if seconds is None else {"duration_seconds": str(seconds)}
    return length | {
        "target_fps": str(item.rate.target),
        "component_id": component_id,
        "preprocess": canonical_json(preprocess),
        **source_metadata(item.sound or item.source.path, item.audio_path.parent),
    }
