"""Reading JSONL dataset files: one record a line."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ltx2_tuner.data.config import find_input
from ltx2_tuner.data.options import text
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

_SOURCE_FIELDS = {"image": ("image_path", "image_path_0"), "video": ("video_path",), "audio": ("audio_path",)}
_REFERENCE_FIELDS = ("reference_path", "control_path", "control_path_0")
_FURTHER_FIELD = re.compile(r"(image|control)_path_[1-9]\d*")
_LISTED = 20


@dataclass(frozen=True)
class Record:
    """One line: paths are resolved, those not given are None."""

    line: int
    source: Path
    caption: str
    reference: Path | None = None
    reference_audio: Path | None = None
    audio: Path | None = None


def read_records(path: Path, kind: str, caption_field: str) -> list[Record]:
    """The records of a JSONL file of an image, video or audio dataset.

    Raises:
        UserError: unreadable, or with every bad line as `file:line: reason`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 JSONL ({error}); check the file") from error
    records, bad, further = [], [], False
    for number, content in enumerate(lines, 1):
        content = content.strip()
        if not content or content.startswith("#"):
            continue
        try:
            values = json.loads(content)
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            records.append(_record(values, number, path, kind, caption_field))
            further = further or any(_FURTHER_FIELD.fullmatch(key) for key in values)
        except (ValueError, RecursionError) as reason:
            bad.append(f"{path}:{number}: {reason}")
    if bad:
        more = [f"and {len(bad) - _LISTED} more lines"] if len(bad) > _LISTED else []
        raise UserError("\n".join(bad[:_LISTED] + more))
    if further:
        logger.warning(
            "%s: only the first picture of a record is used (image_path_1, control_path_1, ... are not)", path
        )
    return records


def _record(values: dict, line: int, file: Path, kind: str, caption_field: str) -> Record:
    """One record; ValueError says what is wrong with it."""
    known = ", ".join(values) or "none"
    field = next((name for name in _SOURCE_FIELDS[kind] if name in values), None)
    if field is None:
        raise ValueError(f"no '{_SOURCE_FIELDS[kind][0]}' field; the fields are {known}")
    if caption_field not in values:
        raise ValueError(f"no '{caption_field}' field for the caption; the fields are {known} (see caption_field)")
    caption = values[caption_field]
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"'{caption_field}' must be a string")
    reference = next((name for name in _REFERENCE_FIELDS if values.get(name) is not None), None)
    companions = {
        "reference": reference if kind != "audio" else None,
        "reference_audio": "reference_audio_path" if kind != "image" else None,
        "audio": "audio_path" if kind == "video" else None,
    }
    paths = {
        name: _path(values[key], key, file)
        for name, key in companions.items()
        if key is not None and values.get(key) is not None
    }
    return Record(line, _path(values[field], field, file), caption or "", **paths)


def _path(value: object, field: str, file: Path) -> Path:
    """The path in a field, from the working directory or the folder of the file.

    A relative path must stay below one of the two: a list of files that someone else made does not reach into the
    rest of the disk unseen. Absolute paths are taken as they are.
    """
    try:
        name = text(value)
    except ValueError as expected:
        raise ValueError(f"'{field}' must be {expected}") from None
    path = find_input(name, file.parent)
    if not Path(name).expanduser().is_absolute() and not any(_inside(path, base) for base in (Path.cwd(), file.parent)):
        raise ValueError(
            f"'{field}' leaves the working directory and the folder of the file ({name}); write an absolute path"
        )
    return path


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path lies below a folder, by its name alone (links are the user's own)."""
    whole, base = os.path.abspath(path), os.path.abspath(folder)  # noqa: PTH100
    try:
        return os.path.commonpath((whole, base)) == base
    except ValueError:  # another drive
        return False
