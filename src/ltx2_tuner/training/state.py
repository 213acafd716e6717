"""State directories: all that a run needs to go on bit for bit, as safetensors and JSON, written whole or not at all.

A state is written into a hidden folder next to its final place; its manifest, with the size and hash of each file,
comes last, and then the folder is renamed. A folder without a complete manifest is never resumed from.
"""

from __future__ import annotations

import datetime
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx2_tuner import files
from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "state_manifest.json"
METADATA = "resume_metadata.json"
FORMAT_VERSION = 1
_ASIDE = ".old"  # ending of a state that makes way for a newer one of its name


@dataclass(frozen=True)
class State:
    """What was read back: groups of tensors by file stem (network, optimizer, random, ...) and the JSON metadata."""

    folder: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    metadata: dict


def save_state(
    folder: Path,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    metadata: Mapping[str, object],
    *,
    state_type: str,
    step: int,
    epoch: int,
    step_in_epoch: int,
) -> None:
    """Write a complete state directory, replacing an older one of the same name.

    Raises:
        UserError: the disk is full; states written earlier stay as they were.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in groups.items():
            files.write_safetensors(temporary / f"{name}.safetensors", tensors)
        files.write_json(temporary / METADATA, metadata)
        manifest = {
            "format_version": FORMAT_VERSION,
            "complete": True,
            "state_type": state_type,
            "global_step": step,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "files": {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())},
            "saved_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }
        files.write_json(temporary / MANIFEST, manifest)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("saved state %s", folder.name)


def load_state(folder: Path) -> State:
    """Read a state directory after checking every file against the manifest.

    Raises:
        UserError: no directory, no complete manifest, or a file that differs from it.
    """
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    tensors = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            file = SafetensorsFile(folder / name)
            tensors[name.removesuffix(".safetensors")] = {key: file.read(key) for key in file.tensors}
    metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    return State(folder, tensors, metadata)


def read_manifest(folder: Path) -> dict:
    """The manifest of a state directory.

    Raises:
        UserError: not a state directory, or an incomplete one.
    """
    if folder.is_file():
        hint = (
            "a LoRA file cannot resume a run; use --network_weights to start from it, or give a ...-state directory"
            if folder.suffix == ".safetensors"
            else "give a ...-state directory"
        )
        raise UserError(f"--resume {folder} is a file: {hint}")
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such directory")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--resume {folder}: no {MANIFEST} in it, so no complete state; give a ...-state directory"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("complete") is not True or "files" not in manifest:
        raise UserError(f"{folder / MANIFEST}: damaged, so the state is not known to be complete; give another one")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder / MANIFEST}: format {manifest.get('format_version')} is of another version")
    return manifest


def _check_files(folder: Path, manifest: dict) -> None:
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or _fingerprint(path) != expected:
            raise UserError(f"{path}: missing or not what the state's manifest lists; resume from another state")


def newest_state(output_dir: Path, output_name: str) -> Path | None:
    """The complete state of this output name with the highest step (then the latest), None without one.

    A damaged one, as a failing disk leaves it, is named and passed over.
    """
    found: list[tuple[int, str, Path, dict]] = []
    for folder in sorted([*output_dir.glob("*-state"), *output_dir.glob(f".*-state{_ASIDE}")]):
        place = _place_of(folder)
        if not belongs_to(place.name, output_name) or (place != folder and place.exists()):
            continue
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            logger.warning("not resumed from: %s", error)
            continue
        found.append((int(manifest["global_step"]), str(manifest["saved_at"]), folder, manifest))
    for _, _, folder, manifest in sorted(found, key=lambda state: state[:2], reverse=True):
        try:
            _check_files(folder, manifest)
        except UserError as error:
            logger.warning("not resumed from: %s", error)
            continue
        return folder
    return None


def remove_leftovers(output_dir: Path, output_name: str) -> None:
    """Delete what a killed run of this name had half written or half removed."""
    for path in output_dir.glob(f".{glob.escape(output_name)}*"):
        name, _, ending = path.name[1:].rpartition(".")
        if ending == "tmp":
            name = name.rpartition(".")[0]  # the number of the process
        if ending not in ("tmp", "removed", "old") or (ending == "old" and not (output_dir / name).exists()):
            continue
        if path.is_dir() and belongs_to(name, output_name):
            shutil.rmtree(path, ignore_errors=True)
        stem = name.partition(".safetensors")[0].removesuffix(".comfy")
        if path.is_file() and belongs_to(f"{stem}-state", output_name):
            path.unlink(missing_ok=True)


def belongs_to(folder_name: str, output_name: str) -> bool:
    """Whether a `...-state` folder was written by a run of this name (`my_lora` owns no state of `my_lora2`)."""
    if not folder_name.startswith(output_name) or not folder_name.endswith("-state"):
        return False
    middle = folder_name[len(output_name) : -len("-state")]
    if middle == "":
        return True
    kind = middle.removeprefix("-")
    number = kind.removeprefix("interrupt-").removeprefix("step")
    return middle.startswith("-") and number.isdigit()


def _fingerprint(path: Path) -> dict[str, object]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Rename into place; an older state of that name is moved aside first and removed afterwards.

    Killed in between, the state aside is the last one, which `newest_state` still finds.
    """
    aside = folder.with_name(f".{folder.name}{_ASIDE}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _place_of(folder: Path) -> Path:
    """Where a state belongs that a killed run had moved aside; any other folder itself."""
    if not folder.name.endswith(_ASIDE):
        return folder
    return folder.with_name(folder.name[1:].removesuffix(_ASIDE))
