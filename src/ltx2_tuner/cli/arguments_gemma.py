"""Flags that name the checkpoint and Gemma, shared by text caching, training, the slider and generation."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch

from ltx2_tuner.text_encoding.options import GemmaOptions

logger = logging.getLogger(__name__)

OFFLOAD_VARIABLE = "LTX2_GEMMA_SAFETENSORS_WEIGHT_OFFLOAD"
_COMPUTE_DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_gemma_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of spec 08 section 1. Defaults that matter only together with another flag are None until then."""
    group = parser.add_argument_group("checkpoint and Gemma")
    group.add_argument("--ltx2_checkpoint", metavar="FILE", help="LTX-2 or LTX-2.3 .safetensors file")
    group.add_argument(
        "--ltx2_text_encoder_checkpoint",
        metavar="FILE",
        help="other file for the text projection and connectors (default: --ltx2_checkpoint)",
    )
    group.add_argument("--gemma_root", metavar="FOLDER", help="Gemma 3 12B in Hugging Face form")
    group.add_argument("--gemma_safetensors", metavar="FILE", help="Gemma 3 12B in one file, tokenizer included")
    group.add_argument("--gemma_load_in_8bit", action="store_true", help="quantise Gemma to 8 bit while loading (CUDA)")
    group.add_argument("--gemma_load_in_4bit", action="store_true", help="quantise Gemma to 4 bit while loading (CUDA)")
    group.add_argument("--gemma_bnb_4bit_quant_type", choices=("nf4", "fp4"), help="4-bit code (default: nf4)")
    group.add_argument(
        "--gemma_bnb_4bit_disable_double_quant", action="store_true", help="do not quantise the scales of 4-bit weights"
    )
    group.add_argument(
        "--gemma_bnb_4bit_compute_dtype",
        choices=tuple(_COMPUTE_DTYPES),
        help="what 4-bit weights are widened to (default: auto, the dtype of --mixed_precision)",
    )
    group.add_argument(
        "--gemma_fp8_weight_offload",
        action=argparse.BooleanOptionalAction,
        help=f"keep fp8 weights of --gemma_safetensors in host memory (default: ${OFFLOAD_VARIABLE}, else on)",
    )


def check_gemma(args: argparse.Namespace, *, required: bool = False) -> list[str]:
    """Sentences about flags that do not go together, found before any file is opened.

    Args:
        args: the parsed flags; `args.device` is None for "CUDA where there is one".
        required: Gemma is certain to be loaded.
    """
    errors = []
    bits = [f"--gemma_load_in_{count}bit" for count in (8, 4) if getattr(args, f"gemma_load_in_{count}bit")]
    if required and not (args.gemma_root or args.gemma_safetensors):
        errors.append("Gemma is needed to encode text; give --gemma_root or --gemma_safetensors")
    if len(bits) == 2:
        errors.append("--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other; drop one")
    if bits:
        flag = bits[0]
        if args.gemma_safetensors:
            errors.append(f"{flag} works with --gemma_root only; drop it, or drop --gemma_safetensors")
        elif not args.gemma_root:
            errors.append(f"{flag} needs --gemma_root")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not device.startswith("cuda"):
            errors.append(f"{flag} needs a CUDA device, but the device is {device}; use --device cuda or drop the flag")
    for name in ("quant_type", "disable_double_quant", "compute_dtype"):
        if getattr(args, f"gemma_bnb_4bit_{name}") and not args.gemma_load_in_4bit:
            errors.append(f"--gemma_bnb_4bit_{name} has an effect with --gemma_load_in_4bit only; add that or drop it")
    if args.gemma_fp8_weight_offload is not None and not args.gemma_safetensors:
        errors.append("--gemma_fp8_weight_offload has an effect with --gemma_safetensors only; drop it")
    return errors


def gemma_options(args: argparse.Namespace) -> GemmaOptions:
    """How Gemma is to be loaded; says so when both sources are given."""
    if args.gemma_root and args.gemma_safetensors:
        logger.warning("--gemma_safetensors wins; --gemma_root is only used for a tokenizer that the file lacks")
    offload = args.gemma_fp8_weight_offload
    if offload is None:
        offload = os.environ.get(OFFLOAD_VARIABLE, "1").strip().lower() in {"1", "true", "yes", "on"}
    return GemmaOptions(
        root=Path(args.gemma_root).expanduser() if args.gemma_root else None,
        safetensors=Path(args.gemma_safetensors).expanduser() if args.gemma_safetensors else None,
        load_in_8bit=args.gemma_load_in_8bit,
        load_in_4bit=args.gemma_load_in_4bit,
        bnb_4bit_quant_type=args.gemma_bnb_4bit_quant_type or "nf4",
        bnb_4bit_double_quant=not args.gemma_bnb_4bit_disable_double_quant,
        bnb_4bit_compute_dtype=_COMPUTE_DTYPES[args.gemma_bnb_4bit_compute_dtype or "auto"],
        fp8_weight_offload=offload,
    )
