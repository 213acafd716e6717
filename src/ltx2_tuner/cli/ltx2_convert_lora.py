"""Convert a LoRA file between the kohya, ComfyUI and diffusers key formats."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.cli.lora_files import DTYPES, check_output, read_known
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.formats import FORMATS, WRITERS, comfy_metadata
from ltx2_tuner.lora.parts import PARTS, scale_parts

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
    parser.add_argument(
        "--scale",
        nargs="+",
        default=(),
        metavar="PART=S",
        help="strength of the parts video, audio and cross; 0 leaves a part out (video=1 audio=0 cross=0)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help="dtype to write; auto: the input's")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_output(args.output, [args.input], "--output")
    scales = part_scales(args.scale)
    lora = read_known(args.input)
    modules, dropped = scale_parts(lora.modules, scales)
    if not modules:
        raise UserError(f"--scale {' '.join(args.scale)} leaves nothing of {args.input}; keep a part it has")
    for part, count in dropped.items():
        logger.info("%d layers of the %s part are left out", count, part)
    target = _ALIASES.get(args.target, args.target)
    tensors = WRITERS[target](modules, DTYPES[args.dtype])
    metadata = lora.metadata if target == "original" else comfy_metadata(lora.metadata)
    write_safetensors(args.output, tensors, metadata)
    logger.info("%s (%s) -> %s (%s), %d layers", args.input, lora.format, args.output, target, len(modules))
    return 0


def part_scales(tokens: Sequence[str]) -> dict[str, float]:
    """Strength by part from tokens such as `audio=0`.

    Raises:
        UserError: no such part, or no finite number.
    """
    scales: dict[str, float] = {}
    for token in tokens:
        part, _, text = token.partition("=")
        try:
            scales[part] = float(text)
        except ValueError:
            scales[part] = math.nan
        if part not in PARTS or not math.isfinite(scales[part]):
            raise UserError(f"--scale {token}: give {', '.join(f'{name}=NUMBER' for name in PARTS)}")
    return scales


if __name__ == "__main__":
    sys.exit(main())
