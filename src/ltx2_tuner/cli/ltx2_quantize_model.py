"""Quantise the transformer of a checkpoint to nf4, once, so that training starts from the small file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ltx2_tuner.checkpoint.quantise_file import quantise_checkpoint
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.cli.values import device
from ltx2_tuner.errors import UserError
from ltx2_tuner.quantization.nf4 import check_block_size


def build_parser() -> Parser:
    """Flags of ltx2_quantize_model.py."""
    parser = Parser("ltx2_quantize_model", "Write a checkpoint whose transformer blocks are nf4, for --nf4_base.")
    add = parser.add_argument
    add("--input_model", required=True, metavar="FILE", help="the original checkpoint (bf16, fp16 or fp32)")
    add("--output_model", required=True, metavar="FILE", help="the file to write, about 42 %% of the size")
    add("--nf4_block_size", type=int, default=32, help="weights that share a scale: 16, 32, 64, 128 ...")
    add("--calc_device", help="where to calculate, such as cuda or cpu (default: cuda where there is one)")
    add("--loftq_init", action="store_true", help="also write LoftQ start values (needs --network_dim)")
    add(
        "--loftq_iters",
        type=int,
        default=2,
        help="accepted: the base of a quantised file is fixed, so one round is run",
    )
    add("--network_dim", type=int, default=0, help="LoRA rank of the LoftQ start values, that of the training to come")
    return parser


def _check(args: argparse.Namespace) -> None:
    problems = []
    try:
        check_block_size(args.nf4_block_size)
    except ValueError as error:
        problems.append(f"--{error}")
    if args.loftq_init and args.network_dim < 1:
        problems.append("--loftq_init needs --network_dim, the rank that you will train with")
    if args.network_dim and not args.loftq_init:
        problems.append("--network_dim has a use with --loftq_init only: add it, or drop --network_dim")
    if args.loftq_iters < 1:
        problems.append(f"--loftq_iters must be at least 1, not {args.loftq_iters}")
    if problems:
        raise UserError("; ".join(problems))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = build_parser().parse_args(argv)
    _check(args)
    quantise_checkpoint(
        args.input_model,
        args.output_model,
        block_size=args.nf4_block_size,
        device=device(args.calc_device),
        loftq_rank=args.network_dim,
        loftq_iterations=args.loftq_iters,
    )


if __name__ == "__main__":
    raise SystemExit(main())
