"""LoRA files on disk: read any format, write deterministically."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.formats import LoRAFile, LoRAMatrices, comfy_metadata, parse, to_comfy, to_original
from ltx2_tuner.lora.names import NameTable

logger = logging.getLogger(__name__)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        UserError: the file is missing, is no safetensors file, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of a LoRA file (.safetensors)"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no readable safetensors file ({error}); download or save it again") from error
    return tensors, metadata


def load_lora(path: str | os.PathLike, table: NameTable | None = None) -> LoRAFile:
    """Read a LoRA of any format; `table` limits the layers to those of a model.

    Raises:
        UserError: see `read_tensors` and `formats.parse`.
    """
    tensors, metadata = read_tensors(path)
    return parse(tensors, table, source=str(path), metadata=metadata)


def save_original(
    path: str | os.PathLike,
    modules: Mapping[str, LoRAMatrices],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write kohya's keys atomically; equal content gives equal bytes."""
    write_safetensors(path, to_original(modules, dtype), metadata)


def save_comfy(
    path: str | os.PathLike,
    modules: Mapping[str, LoRAMatrices],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write ComfyUI's keys atomically, the reference factor under its plain key too."""
    write_safetensors(path, to_comfy(modules, dtype), comfy_metadata(metadata))


def comfy_path(path: str | os.PathLike) -> Path:
    """`out/x.safetensors` -> `out/x.comfy.safetensors`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.comfy{path.suffix}")
