"""Average the checkpoints of one LoRA run (post-hoc EMA)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.cli.lora_files import check_output
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.ema import average, betas
from ltx2_tuner.training.saving import model_hashes

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser("lora_post_hoc_ema", __doc__)
    add = parser.add_argument
    add("path", type=Path, nargs="+", help="two or more LoRA files of one run")
    add("--output_file", type=Path, required=True, metavar="FILE", help="file to write (.safetensors)")
    add("--no_sort", action="store_true", help="take the files in the order given, not by modification time")
    add("--beta", type=float, default=0.95, help="share of the average that each further file leaves")
    add("--beta2", type=float, help="share at the last file; in between it is linear")
    add("--sigma_rel", type=float, help="width of a power-function average in place of beta, such as 0.2")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_output(args.output_file, args.path, "--output_file")
    if len(args.path) < 2:
        raise UserError(f"{args.path[0]} alone has no average; give two or more files of one run")
    for name in ("beta", "beta2"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name} {value:g}: give a share from 0 to 1")
    files = {str(path): SafetensorsFile(path) for path in args.path}
    paths = list(args.path)
    if not args.no_sort:
        paths.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    shares = betas(len(paths), args.beta, args.beta2, args.sigma_rel)
    for path, share in zip(paths, [0.0, *shares]):
        logger.info("%s joins with %.3f of the average kept", path.name, share)

    def read(name: str):
        return {key: files[name].read(key) for key in files[name].tensors}

    tensors = average([str(path) for path in paths], read, shares)
    metadata = files[str(paths[-1])].metadata
    write_safetensors(args.output_file, tensors, {**metadata, **model_hashes(tensors, metadata)})
    logger.info("wrote %s from %d files", args.output_file, len(paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
