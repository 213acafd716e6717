"""What the LoRA scripts share: inputs with multipliers, output checks, dtypes."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.files import load_lora
from ltx2_tuner.lora.formats import LoRAFile

logger = logging.getLogger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """`--lora_weight` and `--lora_multiplier`."""
    parser.add_argument(
        "--lora_weight", type=Path, nargs="+", required=True, metavar="FILE", help="LoRA files of any format, in order"
    )
    parser.add_argument(
        "--lora_multiplier", type=float, nargs="+", default=[1.0], metavar="M", help="strength: one, or one per file"
    )


def multipliers(values: Sequence[float], count: int) -> list[float]:
    """One multiplier per file.

    Raises:
        UserError: neither one value nor one per file, or a value that is not finite.
    """
    if not all(math.isfinite(value) for value in values):
        raise UserError("--lora_multiplier: give finite numbers")
    if len(values) not in (1, count):
        raise UserError(f"--lora_multiplier has {len(values)} values for {count} files; give one, or one per file")
    return list(values) * count if len(values) == 1 else list(values)


def check_output(output: Path, inputs: Sequence[Path], flag: str) -> None:
    """Refuse an output that is an input, a folder, or no safetensors file.

    Raises:
        UserError: with the flag to correct.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"{flag} {output}: give a name that ends in .safetensors")
    if output.is_dir():
        raise UserError(f"{flag} {output}: is a folder; give a file name")
    if any(output.resolve() == path.resolve() for path in inputs):
        raise UserError(f"{flag} {output}: is one of the inputs; give another name")


def read_known(path: Path) -> LoRAFile:
    """A LoRA of which every module is a layer of LTX-2; modules with one matrix only are left out with a warning.

    Raises:
        UserError: a module is no layer of LTX-2.
    """
    lora = load_lora(path)
    if lora.unknown:
        listed = ", ".join(lora.unknown[:3])
        raise UserError(f"{path}: {len(lora.unknown)} modules are no layers of LTX-2 ({listed}); give an LTX-2 LoRA")
    if lora.lonely:
        logger.warning("%s: %d modules have only one of their two matrices, ignored", path, len(lora.lonely))
    return lora
