"""Writing a checkpoint with nf4 transformer blocks: what quantising at load gives, once and for all."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ltx2_tuner.checkpoint.checkpoint import FP8_DTYPES
from ltx2_tuner.checkpoint.keys import canonical_names, component_key
from ltx2_tuner.checkpoint.loftq_file import loftq_path, save_loftq
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import stream_safetensors
from ltx2_tuner.quantization import is_quantisable, nf4
from ltx2_tuner.quantization.loftq import LoftQ

logger = logging.getLogger(__name__)


def quantise_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    block_size: int = 32,
    device: str | torch.device = "cpu",
    loftq_rank: int = 0,
    loftq_iterations: int = 2,
    progress: bool = True,
) -> bool:
    """Write `target`: every tensor of `source` under its name, block matrices as nf4.

    One tensor is held at a time. With `loftq_rank` > 0 start values of that rank are written beside the target.

    Returns:
        False, and nothing is written, when `source` is nf4 already.

    Raises:
        UserError: `source` is damaged, fp8, or the same file as `target`; the disk is full.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the input itself; give --output_model another name")
    with SafetensorsFile(source) as file:
        if file.metadata.get("nf4_quantized") == "true":
            logger.info("%s is nf4 already; nothing to do", source)
            return False
        writer = _Writer(file, block_size, torch.device(device), loftq_rank)
        metadata = file.metadata | {"nf4_quantized": "true", "nf4_block_size": str(block_size)}
        with tqdm(total=len(writer.entries), desc="quantise", unit="tensor", disable=not progress) as bar:

            def produce(name: str) -> Tensor:
                bar.update()
                return writer.produce(name)

            stream_safetensors(target, writer.entries, produce, metadata)
    if writer.loftq is not None:
        if loftq_iterations > 1:
            logger.info("the base of a quantised file is Q(W): --loftq_iters has no effect on its start values")
        path = loftq_path(target, loftq_rank)
        save_loftq(path, writer.loftq.factors, rank=loftq_rank, iterations=loftq_iterations, block_size=block_size)
        logger.info("wrote %s (%d layers)", path, len(writer.loftq.factors))
    return True


class _Writer:
    """The tensors of the new file, made when they are asked for."""

    def __init__(self, file: SafetensorsFile, block_size: int, device: torch.device, loftq_rank: int) -> None:
        self.file = file
        self.block_size = block_size
        self.device = device
        self.layers = {
            name: component_key(canonical, "transformer") for name, canonical in canonical_names(file.tensors).items()
        }
        self.loftq = LoftQ(loftq_rank, 1, block_size) if loftq_rank else None
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.parts: dict[str, str] = {}  # name of a part -> name of the weight
        self._made: tuple[str, nf4.Nf4Tensor] | None = None
        for name, entry in file.tensors.items():
            if self._is_target(name):
                self._add_quantised(name)
            else:
                self.entries[name] = (entry.dtype, entry.shape)
        if not self.parts:
            raise UserError(f"{file.path}: has no transformer blocks to quantise; give an LTX-2 checkpoint")

    def produce(self, name: str) -> Tensor:
        if name not in self.parts:
            return self.file.read(name)
        weight = self.parts[name]
        if name.endswith(".nf4_shape"):
            return torch.tensor(self.file.tensors[weight].shape)
        # Names come in sorted order: scale and codes of a weight follow each other closely.
        if self._made is None or self._made[0] != weight:
            self._made = (weight, self._quantise(weight))
        return self._made[1].codes if name == weight else self._made[1].scale

    def _is_target(self, name: str) -> bool:
        entry = self.file.tensors[name]
        if self.layers[name] is None or not is_quantisable(name, entry.shape):
            return False
        if entry.dtype in FP8_DTYPES:
            raise UserError(f"{self.file.path}: is an fp8 checkpoint; quantise the original bf16 one")
        if entry.shape[1] % self.block_size:
            logger.warning(
                "%s keeps its precision: %d inputs are no multiple of %d", name, entry.shape[1], self.block_size
            )
            return False
        return entry.dtype.is_floating_point

    def _add_quantised(self, name: str) -> None:
        dtype, (rows, columns) = self.file.tensors[name].dtype, self.file.tensors[name].shape
        base = name.removesuffix(".weight")
        self.entries |= {
            name: (torch.uint8, (rows, columns // 2)),
            f"{base}.scale_weight": (dtype, (rows, columns // self.block_size, 1)),
            f"{base}.nf4_shape": (torch.int64, (2,)),
        }
        self.parts |= dict.fromkeys((name, f"{base}.scale_weight", f"{base}.nf4_shape"), name)

    def _quantise(self, name: str) -> nf4.Nf4Tensor:
        weight = self.file.read(name, self.device)
        if self.loftq is None:
            return nf4.quantise(weight, self.block_size)
        return self.loftq(self.layers[name], weight)
