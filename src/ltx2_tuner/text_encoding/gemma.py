"""Gemma 3 as a text model, from a directory or a single file.

Only parameters are made without storage; the rotary and scale buffers of the model are computed for real from its
config, so nothing here depends on how a version of transformers names them. Weights are cast while they are read: a
later cast of the whole model would round the rotary buffers.
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.devices import exact
from ltx2_tuner.errors import UserError
from ltx2_tuner.text_encoding.fp8 import Fp8Linear
from ltx2_tuner.text_encoding.options import GemmaOptions
from ltx2_tuner.text_encoding.weights import FP8, GemmaWeights, find_weights, gemma_files, infer_config

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, Gemma3TextModel

logger = logging.getLogger(__name__)

SMALLER = "use --gemma_load_in_8bit or --gemma_load_in_4bit with --gemma_root, or an fp8 file with --gemma_safetensors"


@dataclass(frozen=True)
class GemmaSource:
    """Opened weight files and the config they come with; nothing is loaded yet."""

    options: GemmaOptions
    folder: Path | None
    weights: GemmaWeights
    config: Gemma3TextConfig
    files: tuple[SafetensorsFile, ...]
    prequantized: bool

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_gemma(options: GemmaOptions) -> GemmaSource:
    """Open Gemma's files and read headers and config.

    Raises:
        UserError: files are missing, damaged or no Gemma 3.
    """
    if options.safetensors is not None:
        folder, paths = None, [options.safetensors]
    else:
        folder, paths = gemma_files(options.root)
    files = tuple(SafetensorsFile(path) for path in paths)
    weights = find_weights(files)
    config, prequantized = (_inferred(weights), False) if folder is None else _directory_config(folder)
    return GemmaSource(options, folder, weights, config, files, prequantized)


def load_gemma(source: GemmaSource, device: torch.device, dtype: torch.dtype) -> Gemma3TextModel:
    """The text model on `device`, frozen, in eval mode.

    Raises:
        UserError: tensors are missing or have other shapes than the config says, or the device is too small.
    """
    if source.options.quantized or source.prequantized:
        return _load_quantized(source, device, dtype)
    _check_memory(source, device, dtype)
    with _too_small(device):
        return _load_plain(source, device, dtype)


def _inferred(weights: GemmaWeights) -> Gemma3TextConfig:
    prepare_torchaudio()
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**infer_config(weights))


def _directory_config(folder: Path) -> tuple[Gemma3TextConfig, bool]:
    prepare_torchaudio()
    from transformers import AutoConfig, Gemma3TextConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'}: cannot be read ({error}); download the Gemma folder again"
        ) from error
    text = getattr(config, "text_config", config)
    if not isinstance(text, Gemma3TextConfig):
        raise UserError(f"{folder}: is a {config.model_type} model; give the folder of a Gemma 3 model")
    return text, getattr(config, "quantization_config", None) is not None


def _load_plain(source: GemmaSource, device: torch.device, dtype: torch.dtype) -> Gemma3TextModel:
    from accelerate import init_empty_weights
    from transformers import Gemma3TextModel

    with init_empty_weights(include_buffers=False):
        model = Gemma3TextModel(source.config)
    _check_complete(source, model)
    modules = dict(model.named_modules())
    weights = source.weights
    for name, parameter in tqdm(list(model.named_parameters()), desc="loading Gemma", unit="tensor", leave=False):
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        if weights.entry(name).dtype in FP8 and isinstance(module, nn.Linear):
            parent, _, child = owner.rpartition(".")
            layer = Fp8Linear(weights.read(name), weights.read_scale(name), device, source.options.fp8_weight_offload)
            setattr(modules[parent], child, layer)
            continue
        tensor = weights.read(name, device, dtype)
        scale = weights.read_scale(name)
        if scale is not None:
            tensor = (tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1)).to(device)).to(dtype)
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(module, attribute, parameter)
    for module in modules.values():  # buffers keep their dtype
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _check_complete(source: GemmaSource, model: nn.Module) -> None:
    """Compare names and shapes in the files with those of the model, before anything is read."""
    weights = source.weights
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [name for name in wanted if name not in weights.tensors]
    unknown = [name for name in weights.tensors if name not in wanted]
    path = source.options.source
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has tensors of no Gemma 3 text model:", unknown)
        raise UserError(
            f"{path}: {what} {', '.join(weights.prefix + name for name in names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; give a complete Gemma 3 model"
        )
    for name, shape in wanted.items():
        entry = weights.entry(name)
        if entry.shape != shape:
            raise UserError(
                f"{path}: {weights.prefix}{name} has the shape {list(entry.shape)}, but needs {list(shape)}; "
                "give an unpacked Gemma 3 model"
            )
        if name in weights.scales:
            file, stored = weights.scales[name]
            count = file.tensors[stored].shape
            if count not in ((), (1,), (shape[0],), (shape[0], 1)):
                raise UserError(
                    f"{path}: {stored} has the shape {list(count)}, a block-wise scale, which is not supported; "
                    "use an fp8 file with one scale per tensor or row, or a bf16 file"
                )


def _load_quantized(source: GemmaSource, device: torch.device, dtype: torch.dtype) -> Gemma3TextModel:
    """Through bitsandbytes: 8 or 4 bit while loading, or a directory that was saved quantised."""
    from transformers import BitsAndBytesConfig, Gemma3TextModel

    options = source.options
    quantization = None
    if options.load_in_8bit:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif options.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.bnb_4bit_double_quant,
            bnb_4bit_compute_dtype=options.bnb_4bit_compute_dtype or dtype,
        )
    if device.type != "cuda":
        raise UserError(f"{options.source}: bitsandbytes weights need a CUDA device; use --device cuda")
    arguments = {} if quantization is None else {"quantization_config": quantization}
    with _too_small(device):
        model, info = Gemma3TextModel.from_pretrained(
            str(source.folder),
            config=source.config,
            dtype=dtype,
            key_mapping={f"^{re.escape(source.weights.prefix)}": ""},
            device_map={"": exact(device).index},
            output_loading_info=True,
            local_files_only=True,
            **arguments,
        )
    # Without the right prefix the load "succeeds" with random weights.
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{source.folder}: lacks {names}; give a complete Gemma 3 model")
    return model.requires_grad_(False).eval()


def _check_memory(source: GemmaSource, device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        return
    need = 0
    for name in source.weights.tensors:
        entry = source.weights.entry(name)
        stays_fp8 = entry.dtype in FP8 and name.endswith("_proj.weight")
        if not (stays_fp8 and source.options.fp8_weight_offload):
            need += entry.nbytes if stays_fp8 else entry.nbytes // entry.dtype.itemsize * dtype.itemsize
    free, _total = torch.cuda.mem_get_info(device)
    if need > free:
        logger.warning(
            "Gemma needs %.1f GB on %s, where %.1f GB are free; should it run out of memory, %s",
            need / 1e9,
            device,
            free / 1e9,
            SMALLER,
        )


@contextlib.contextmanager
def _too_small(device: torch.device):
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"Gemma does not fit on {device}; {SMALLER}") from error
