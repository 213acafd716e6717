"""A model made of one or more safetensors files: its tensors under the single-file names, its config, its version."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx2_tuner.checkpoint.config import complete_config
from ltx2_tuner.checkpoint.keys import DIT, canonical_names, component_key
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class _Location:
    file: SafetensorsFile
    name: str  # in that file


class Checkpoint:
    """Use `Checkpoint.open(path, ...)`.

    Attributes:
        path: the first file.
        metadata: its metadata strings.
        config: sections transformer, vae, audio_vae, vocoder of the components that are there; inferred where the
            metadata lacks them.
        version: "2.0", "2.3" or "2.5".
        version_markers: which facts speak for 2.3 or later.
        is_fp8: some block weight is stored in fp8.
        is_nf4: written by ltx2_quantize_model.py; `nf4_block_size` is then its block size.
    """

    def __init__(self, files: Iterable[SafetensorsFile]) -> None:
        self.files = tuple(files)
        self.path: Path = self.files[0].path
        self.metadata: dict[str, str] = self.files[0].metadata
        self._locations: dict[str, _Location] = {}
        for file in self.files:
            self._add(file)
        self.config = self._complete_config()
        self.version_markers = _markers(self.config)
        self.version = _version(self.config, self.version_markers, self.metadata.get("model_version", ""))
        self.is_nf4 = self.metadata.get("nf4_quantized") == "true"
        self.nf4_block_size = self._nf4_block_size() if self.is_nf4 else None
        self.is_fp8 = any(
            self.entry(name).dtype in FP8_DTYPES
            for name in self._locations
            if name.startswith(f"{DIT}transformer_blocks.") and name.endswith(".weight")
        )

    @classmethod
    def open(cls, path: str | os.PathLike, *more_paths: str | os.PathLike) -> Checkpoint:
        """Open files that together are one model; config and metadata come from the first.

        Raises:
            UserError: a file is missing or damaged, or is no LTX-2 file.
        """
        return cls([SafetensorsFile(each) for each in (path, *more_paths)])

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def names(self, prefix: str = "") -> list[str]:
        """Canonical tensor names that begin with `prefix`, in file order."""
        return [name for name in self._locations if name.startswith(prefix)]

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and position of a tensor by its canonical name."""
        location = self._locations[name]
        return location.file.tensors[location.name]

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor by its canonical name (SafetensorsFile.read)."""
        location = self._locations[name]
        return location.file.read(location.name, device, dtype)

    def reserve(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Memory for a tensor by its canonical name (SafetensorsFile.reserve)."""
        location = self._locations[name]
        return location.file.reserve(location.name, device)

    def fill(self, name: str, tensor: torch.Tensor, start: int = 0, stop: int | None = None) -> None:
        """Read some bytes of a tensor by its canonical name (SafetensorsFile.fill)."""
        location = self._locations[name]
        location.file.fill(location.name, tensor, start, stop)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Raw bytes of a tensor by its canonical name (SafetensorsFile.read_range)."""
        location = self._locations[name]
        return location.file.read_range(location.name, start, length)

    def component(self, component: str) -> dict[str, str]:
        """Module key -> canonical name of the tensors of a component (keys.COMPONENTS)."""
        found = ((component_key(name, component), name) for name in self._locations)
        return {key: name for key, name in found if key is not None}

    def _complete_config(self) -> dict[str, dict]:
        text = self.metadata.get("config", "{}")
        try:
            given = json.loads(text)
            if not isinstance(given, dict):
                raise ValueError("it is no JSON object")
            return complete_config(given, {name: self.entry(name).shape for name in self._locations})
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise UserError(
                f"{self.path}: its config is damaged or describes no LTX-2 model ({error}); "
                "copy or download the file again"
            ) from error

    def _nf4_block_size(self) -> int:
        text = self.metadata.get("nf4_block_size", "32")
        if not text.isdecimal() or int(text) < 1:
            raise UserError(
                f"{self.path}: its nf4_block_size is {text!r}; write the file again with ltx2_quantize_model.py"
            )
        return int(text)

    def _add(self, file: SafetensorsFile) -> None:
        names = canonical_names(file.tensors)
        taken: dict[str, str] = {}
        for name, canonical in names.items():
            if canonical in taken:
                raise UserError(
                    f"{file.path}: {name!r} and {taken[canonical]!r} are the same tensor under two prefixes; "
                    "use a file that has one set of weights"
                )
            taken[canonical] = name
            self._locations.setdefault(canonical, _Location(file, name))


def check_version(checkpoint: Checkpoint, wanted: str | None, mode: str = "warn") -> str:
    """The version to work with: `wanted` when it was given, else what the checkpoint says.

    Args:
        wanted: "2.0", "2.3" or None.
        mode: what a mismatch does: "off" nothing, "warn" one warning, "error" an error.

    Raises:
        UserError: a mismatch in mode "error".
    """
    if wanted is None or wanted == checkpoint.version:
        return checkpoint.version
    if mode != "off":
        markers = ", ".join(checkpoint.version_markers) or "no marker of a later version"
        text = (
            f"{checkpoint.path}: is an LTX-{checkpoint.version} checkpoint ({markers}), but --ltx_version is {wanted}; "
            f"use --ltx_version {checkpoint.version} or leave the flag out"
        )
        if mode == "error":
            raise UserError(text)
        logger.warning(text)
    return wanted


def parse_model_version(text: str) -> tuple[int, ...]:
    """`"2.3.rc1"` -> (2, 3): the leading all-digit parts between dots and dashes; () when there are none."""
    parts: list[int] = []
    for part in text.replace("-", ".").split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)


def _markers(config: Mapping[str, dict]) -> tuple[str, ...]:
    transformer, vocoder = config.get("transformer", {}), config.get("vocoder", {})
    markers = []
    if transformer.get("cross_attention_adaln") is True:
        markers.append("transformer.cross_attention_adaln")
    if isinstance(vocoder.get("bwe"), dict):
        markers.append("vocoder.bwe")
    for key in ("num_attention_heads", "attention_head_dim", "num_layers"):
        if f"audio_connector_{key}" in transformer:
            markers.append(f"transformer.audio_connector_{key}")
    if transformer.get("caption_proj_before_connector") is True:
        markers.append("transformer.caption_proj_before_connector")
    return tuple(markers)


def _version(config: Mapping[str, dict], markers: tuple[str, ...], model_version: str) -> str:
    if parse_model_version(model_version) >= (2, 5):
        return "2.5"
    if not markers:
        return "2.0"
    return "2.5" if config.get("transformer", {}).get("ff_bias") is False else "2.3"
