"""Merge LoRA files into a checkpoint; every other tensor of it is copied as it is."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.checkpoint.keys import DIT, canonical_names
from ltx2_tuner.cli import values
from ltx2_tuner.cli.lora_files import add_inputs, check_output, multipliers
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import stream_safetensors
from ltx2_tuner.lora.deltas import WeightDeltas
from ltx2_tuner.lora.files import load_lora
from ltx2_tuner.quantization import fp8

logger = logging.getLogger(__name__)

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def build_parser() -> Parser:
    parser = Parser("ltx2_merge_lora_to_model", __doc__)
    parser.add_argument(
        "--ltx2_checkpoint", "--dit", type=Path, required=True, metavar="FILE", help="base checkpoint (not an nf4 file)"
    )
    add_inputs(parser)
    parser.add_argument("--save_merged_model", type=Path, required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--device", default="cpu", help="where the sums are computed")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    weights = multipliers(args.lora_multiplier, len(args.lora_weight))
    check_output(args.save_merged_model, [args.ltx2_checkpoint, *args.lora_weight], "--save_merged_model")
    device = values.device(args.device)
    with SafetensorsFile(args.ltx2_checkpoint) as base:
        if base.metadata.get("nf4_quantized") == "true":
            raise UserError(f"{base.path}: is nf4, nothing can be merged into it; give the original checkpoint")
        deltas = WeightDeltas([(load_lora(path), weight) for path, weight in zip(args.lora_weight, weights)], device)
        merger = ModelMerger(base, deltas)
        metadata = base.metadata | {
            "merge_sources": json.dumps([path.name for path in args.lora_weight], ensure_ascii=False),
            "merge_multipliers": json.dumps(weights),
        }
        entries = {name: (entry.dtype, entry.shape) for name, entry in base.tensors.items()}
        with tqdm(total=len(entries), desc="merge", unit="tensor") as bar:

            def produce(name: str) -> Tensor:
                bar.update()
                return merger.produce(name)

            merger.check()
            stream_safetensors(args.save_merged_model, entries, produce, metadata)
    logger.info("wrote %s: %d weights changed", args.save_merged_model, len(deltas.used))
    return 0


class ModelMerger:
    """Tensors of the merged checkpoint, one at a time.

    An fp8 weight is expanded, changed and quantised again, with a new scale in the old one's shape. Weight and scale
    are asked for one after the other; whichever comes first leaves the other waiting.

    Attributes:
        changed: name of each weight that some LoRA changes -> path of its layer.
    """

    def __init__(self, base: SafetensorsFile, deltas: WeightDeltas) -> None:
        self.base = base
        self.deltas = deltas
        wanted = deltas.paths
        self.changed: dict[str, str] = {}
        for name, key in canonical_names(base.tensors).items():
            path = key.removeprefix(DIT).removesuffix(".weight")
            if key.endswith(".weight") and path in wanted:
                self.changed[name] = path
        fp8_weights = [name for name in self.changed if base.tensors[name].dtype in _FP8]
        if fp8_weights:
            logger.warning("%s is fp8: merged weights are quantised a second time", base.path)
        self._scales = {name: scale for name in fp8_weights if (scale := self._scale_name(name)) is not None}
        self._weight_of = {scale: name for name, scale in self._scales.items()}
        self._waiting: dict[str, Tensor] = {}

    def check(self) -> None:
        """Refuse LoRAs that do not belong to this checkpoint before anything is written.

        Raises:
            UserError: a file changes nothing, or a layer's size differs.
        """
        shapes = {path: self.base.tensors[name].shape for name, path in self.changed.items()}
        for lora, _ in self.deltas.loras:
            hit = [path for path in lora.modules if path in shapes]
            if not hit:
                raise UserError(f"{lora.source}: none of its modules is a layer of {self.base.path}; give another LoRA")
            for path in hit:
                found = (lora.modules[path].up.shape[0], lora.modules[path].down.shape[1])
                if found != shapes[path]:
                    raise UserError(
                        f"{lora.source}: {path} is for a layer of size {found[0]}x{found[1]}, "
                        f"that of {self.base.path} has shape {list(shapes[path])}; give a LoRA of this model"
                    )
            left_out = len(lora.modules) + len(lora.unknown) - len(hit)
            if left_out:
                logger.warning("%s: %d modules have no layer in the checkpoint, ignored", lora.source, left_out)

    def produce(self, name: str) -> Tensor:
        """The tensor `name` of the result, in its dtype and shape."""
        if name in self._waiting:
            return self._waiting.pop(name)
        weight_name = self._weight_of.get(name, name)
        if weight_name not in self.changed:
            return self.base.read(name)
        key = f"{self.changed[weight_name]}.weight"
        stored = self.base.read(weight_name)
        if stored.dtype not in _FP8:
            return self.deltas(key, stored)
        scale_name = self._scales.get(weight_name)
        scale = None if scale_name is None else self.base.read(scale_name)
        codes, new_scale = requantise(
            self.deltas(key, fp8.dequantise(stored, scale, torch.float32)), scale, stored.dtype
        )
        if scale_name is not None:
            self._waiting |= {weight_name: codes, scale_name: new_scale}
            return self._waiting.pop(name)
        return codes

    def _scale_name(self, weight_name: str) -> str | None:
        stem = weight_name.removesuffix(".weight")
        return next((s for s in (f"{stem}.weight_scale", f"{stem}.scale_weight") if s in self.base.tensors), None)


def requantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """fp8 codes of a float32 weight (out, in), and a new scale in the shape and dtype of the old one.

    Shapes: [] or [1] one scale, (out, 1) one a row, (out, groups, 1) one a group of inputs; None: a plain cast.
    """
    limit = torch.finfo(dtype).max
    if scale is None:
        return weight.clamp(-limit, limit).to(dtype), None
    if scale.dim() == 3:
        grouped = weight.view(weight.shape[0], scale.shape[1], -1)
        new_scale = (grouped.abs().amax(-1, keepdim=True) / limit).clamp_min(1e-8).to(scale.dtype)
        codes = (grouped / new_scale.float()).clamp(-limit, limit).to(dtype).view(weight.shape)
        return codes, new_scale
    largest = weight.abs().amax(1, keepdim=True) if scale.dim() == 2 else weight.abs().amax()
    new_scale = (largest / limit).clamp_min(1e-8).to(scale.dtype)
    codes = (weight / new_scale.float()).clamp(-limit, limit).to(dtype)
    return codes, new_scale.reshape(scale.shape)


if __name__ == "__main__":
    sys.exit(main())
