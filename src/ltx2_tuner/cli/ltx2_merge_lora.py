"""Merge LoRA files into one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner import __version__
from ltx2_tuner.cli import values
from ltx2_tuner.cli.lora_files import DTYPES, add_inputs, check_output, multipliers, read_known
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.formats import RENAMERS, WRITERS, LoRAFile
from ltx2_tuner.lora.merging import (
    RANK_MODES,
    Modules,
    OrthogonalOptions,
    merge_concat,
    merge_orthogonal,
    merged_metadata,
    output_dtype,
)

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser("ltx2_merge_lora", __doc__)
    add_inputs(parser)
    add = parser.add_argument
    add(
        "--save_merged_lora",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write, in the first input's format",
    )
    add(
        "--merge_method",
        choices=["concat", "orthogonal"],
        default="concat",
        help="concat: exact sum; orthogonal: two files, each projected off the other's main directions",
    )
    add(
        "--orthogonal_k_fraction", type=float, default=0.5, help="share of the other's directions projected out, 0 to 1"
    )
    add("--orthogonal_rank_mode", choices=list(RANK_MODES), default="sum", help="rank of the result from the two ranks")
    add("--dtype", choices=list(DTYPES), default="auto", help="dtype to write; auto: promoted from the inputs'")
    add("--emit_alpha", action="store_true", help="write alpha keys in every format")
    add("--device", default="cpu", help="where the orthogonal merge computes")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    weights = multipliers(args.lora_multiplier, len(args.lora_weight))
    check_output(args.save_merged_lora, args.lora_weight, "--save_merged_lora")
    if not 0 <= args.orthogonal_k_fraction <= 1:
        raise UserError(f"--orthogonal_k_fraction {args.orthogonal_k_fraction}: give a share from 0 to 1")
    if args.merge_method == "orthogonal" and len(args.lora_weight) != 2:
        raise UserError(f"--merge_method orthogonal merges exactly 2 files, not {len(args.lora_weight)}; use concat")
    if args.merge_method == "concat" and (args.orthogonal_k_fraction, args.orthogonal_rank_mode) != (0.5, "sum"):
        logger.warning(
            "--orthogonal_k_fraction and --orthogonal_rank_mode: no effect without --merge_method orthogonal"
        )
    loras = [read_known(path) for path in args.lora_weight]
    extra = {
        "merged_with": f"ltx2-tuner {__version__}",
        "merge_format": loras[0].format,
        "merge_method": args.merge_method,
    }
    if args.merge_method == "concat":
        merged = merge_concat(loras, weights)
    else:
        device = values.device(args.device)
        options = OrthogonalOptions(args.orthogonal_k_fraction, args.orthogonal_rank_mode, device)
        merged = merge_orthogonal(loras, weights, options)
        extra["merge_orthogonal_k_fraction"] = str(options.fraction)
        extra["merge_orthogonal_rank_mode"] = options.rank_mode
    metadata, warnings = merged_metadata(loras, weights, merged, extra)
    for warning in warnings:
        logger.warning("%s", warning)
    dtype = DTYPES[args.dtype] or output_dtype(loras)
    write_safetensors(args.save_merged_lora, _tensors(loras, merged, dtype, args.emit_alpha), metadata)
    logger.info("wrote %s: %d layers, %s", args.save_merged_lora, len(merged), values.dtype_name(dtype))
    return 0


def _tensors(loras: list[LoRAFile], merged: Modules, dtype: torch.dtype, emit_alpha: bool) -> dict[str, torch.Tensor]:
    """The result in the first input's format; alpha (= rank) stays float32."""
    target = loras[0].format
    tensors = WRITERS[target](merged, dtype)
    if emit_alpha or target == "original":
        rename = RENAMERS[target]
        tensors |= {f"{rename(path)}.alpha": torch.tensor(float(m.rank)) for path, m in merged.items()}
    return tensors


if __name__ == "__main__":
    sys.exit(main())
