"""Train a LoRA on cached latents and text."""

from __future__ import annotations

from collections.abc import Sequence

from ltx2_tuner.cli import arguments_network, arguments_optimizer
from ltx2_tuner.cli.arguments_gemma import add_gemma_arguments
from ltx2_tuner.cli.arguments_memory import (
    add_attention_arguments,
    add_memory_arguments,
    add_precision_arguments,
)
from ltx2_tuner.cli.arguments_output import add_logging_arguments, add_saving_arguments
from ltx2_tuner.cli.arguments_sampling import add_preview_arguments, add_sampling_arguments
from ltx2_tuner.cli.arguments_training import (
    add_data_arguments,
    add_general_arguments,
    add_noise_arguments,
    add_regularizer_arguments,
)
from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.cli.references import check_reference_lengths
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.cli.training_run import carry_out, command_words, join_processes, mixed_precision
from ltx2_tuner.training.sources import open_sources


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser("ltx2_train_network", __doc__)
    add_arguments(parser)
    return parser


def add_arguments(parser: Parser) -> None:
    """The flags that all training scripts share."""
    add_general_arguments(parser)
    add_gemma_arguments(parser)
    arguments_network.add_arguments(parser)
    arguments_optimizer.add_arguments(parser)
    add_noise_arguments(parser)
    add_data_arguments(parser)
    add_regularizer_arguments(parser)
    add_precision_arguments(parser)
    add_memory_arguments(parser)
    add_attention_arguments(parser)
    add_preview_arguments(parser)
    add_sampling_arguments(parser)
    add_saving_arguments(parser)
    add_logging_arguments(parser)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parse_with_config(parser, argv)
    if args.show_timesteps and not args.output_dir:
        args.output_dir = "."
    config = training_config(args, mixed_precision(args))
    processes = join_processes(args)
    sources = open_sources(config, processes)
    if config.strategy == "v2v":
        check_reference_lengths(args, sources.training.inventories)
    return carry_out(args, config, processes, sources, command=command_words(parser, argv))


if __name__ == "__main__":
    raise SystemExit(main())
