"""Convert a LoRA file between the kohya, ComfyUI and diffusers key formats."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.cli.lora_files import DTYPES, check_output, read_known
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.formats import FORMATS, WRITERS, comfy_metadata

logger = logging.getLogger(__name__)

# Upstream's words for the first two formats.
_ALIASES = {"default": "original", "other": "comfy"}


def build_parser() -> Parser:
    parser = Parser("ltx2_convert_lora", __doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="LoRA file of any format")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write (.safetensors)")
    parser.add_argument(
        "--target",
        choices=[*FORMATS, *_ALIASES],
        required=True,
        help="format to write; default and other mean original and comfy",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help="dtype to write; auto: the input's")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_output(args.output, [args.input], "--output")
    lora = read_known(args.input)
    target = _ALIASES.get(args.target, args.target)
    tensors = WRITERS[target](lora.modules, DTYPES[args.dtype])
    metadata = lora.metadata if target == "original" else comfy_metadata(lora.metadata)
    write_safetensors(args.output, tensors, metadata)
    logger.info("%s (%s) -> %s (%s), %d layers", args.input, lora.format, args.output, target, len(lora.modules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
