"""Gemma's text weights in one or several safetensors files: which tensors, how large, what model they make."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltx2_tuner.checkpoint.fingerprint import fingerprint
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from ltx2_tuner.errors import UserError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EMBEDDING = "embed_tokens.weight"
_PARTS = ("embed_tokens.", "layers.", "norm.")
# Tensors beside a weight: scales of this format (used) and scales for quantised activations, format notes (not used).
_SCALES = ("weight_scale", "scale_weight")
_IGNORED = ("input_scale", "scale_input", "comfy_quant")
_LAYER = re.compile(r"layers\.(\d+)\.")
_HIDDEN_1B = 1152
_HIDDEN_27B = 5376


@dataclass(frozen=True)
class GemmaWeights:
    """Text tensors by their names in `Gemma3TextModel`.

    Attributes:
        prefix: what stood before the names in the files.
        tensors: name -> file and name there; scales are in `scales`, by the name of their weight.
    """

    path: Path
    prefix: str
    tensors: dict[str, tuple[SafetensorsFile, str]]
    scales: dict[str, tuple[SafetensorsFile, str]]

    def entry(self, name: str) -> TensorEntry:
        file, stored = self.tensors[name]
        return file.tensors[stored]

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        file, stored = self.tensors[name]
        return file.read(stored, device, dtype)

    def read_scale(self, name: str) -> torch.Tensor | None:
        """Scale of an fp8 weight, float32: one number or one per row; None when the file has none."""
        if name not in self.scales:
            return None
        file, stored = self.scales[name]
        return file.read(stored, dtype=torch.float32)

    def fingerprint(self) -> str:
        """16 hex digits of what is loaded; the same weights have the same id in every layout and under every prefix."""
        places = {**self.tensors, **{f"{name}_scale": place for name, place in self.scales.items()}}
        entries = {name: file.tensors[stored] for name, (file, stored) in places.items()}

        def read(name: str, start: int, length: int) -> bytes:
            file, stored = places[name]
            return file.read_range(stored, start, length)

        return fingerprint(entries, read)


def gemma_files(root: Path) -> tuple[Path, list[Path]]:
    """The folder that holds Gemma's config and its weight files, at or below `root`.

    Raises:
        UserError: there is no such folder, or a file of its index is missing.
    """
    if not root.is_dir():
        raise UserError(f"--gemma_root {root}: no such directory; give the folder of a Gemma 3 model")
    folders = [root] if (root / "config.json").is_file() else sorted(path.parent for path in root.rglob("config.json"))
    for folder in folders:
        files = _indexed_files(folder) or sorted(folder.glob("model*.safetensors"))
        if files:
            return folder, files
    raise UserError(
        f"--gemma_root {root}: holds no config.json with model*.safetensors; give the complete Gemma folder, "
        "or a single file with --gemma_safetensors"
    )


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is damaged; download the Gemma folder again") from error
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index}: names files outside of its folder; download the Gemma folder again")
    return [folder / name for name in names]


def find_weights(files: Sequence[SafetensorsFile]) -> GemmaWeights:
    """Pick Gemma's text tensors out of files that may hold vision, projector and tokenizer tensors too.

    Raises:
        UserError: no or several text models, or a packed format that is not supported.
    """
    path = files[0].path if len(files) == 1 else files[0].path.parent
    embeddings = [
        name for file in files for name in file.tensors if re.search(rf"(^|\.){re.escape(_EMBEDDING)}$", name)
    ]
    if len(embeddings) != 1:
        found = f"has {len(embeddings)} tensors" if embeddings else "has no tensor"
        raise UserError(f"{path}: {found} named ...{_EMBEDDING}; give a Gemma 3 text encoder")
    prefix = embeddings[0].removesuffix(_EMBEDDING)
    tensors: dict[str, tuple[SafetensorsFile, str]] = {}
    scales: dict[str, tuple[SafetensorsFile, str]] = {}
    for file in files:
        for stored, entry in file.tensors.items():
            name = stored.removeprefix(prefix)
            if not stored.startswith(prefix) or not name.startswith(_PARTS):
                continue
            stem, _, last = name.rpartition(".")
            if last in _SCALES:
                scales[f"{stem}.weight"] = (file, stored)
            elif last == "weight_scale_2" or (last == "weight" and not entry.dtype.is_floating_point):
                raise UserError(
                    f"{file.path}: is packed to 4 or 8 bit integers ({stored}), which is not supported; use a bf16 or "
                    "fp8 file, or --gemma_root with --gemma_load_in_4bit"
                )
            elif last not in _IGNORED:
                tensors[name] = (file, stored)
    return GemmaWeights(path, prefix, tensors, scales)


def infer_config(weights: GemmaWeights) -> dict[str, Any]:
    """Arguments of `Gemma3TextConfig`, from shapes alone.

    Raises:
        UserError: tensors that every Gemma 3 has are missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights.tensors:
            raise UserError(f"{weights.path}: lacks {weights.prefix}{name}; give a complete Gemma 3 file")
        return weights.entry(name).shape

    vocabulary, hidden = shape(_EMBEDDING)
    (head_dim,) = shape("layers.0.self_attn.q_norm.weight")
    small = hidden == _HIDDEN_1B
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shape("layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": 1 + max(int(match[1]) for match in map(_LAYER.match, weights.tensors) if match),
        "head_dim": head_dim,
        "num_attention_heads": shape("layers.0.self_attn.q_proj.weight")[0] // head_dim,
        "num_key_value_heads": shape("layers.0.self_attn.k_proj.weight")[0] // head_dim,
        "query_pre_attn_scalar": 168 if hidden == _HIDDEN_27B else head_dim,
        "sliding_window": 512 if small else 1024,
        "sliding_window_pattern": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "max_position_embeddings": 32768 if small else 131072,
    }
    if not small:
        # Every sixth layer sees positions divided by 8; without it all hidden states from layer 6 on are wrong.
        config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    return config
