"""Train a LoRA on cached latents and text."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner.cli import arguments_network, arguments_optimizer, values
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
from ltx2_tuner.cli.config_file import parse_with_config, write_effective
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.cli.previews import make_previewer
from ltx2_tuner.cli.references import check_reference_lengths
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.build import Processes, TrainingConfig, build, open_sources, settle_draws
from ltx2_tuner.training.inspect import dataset_lines, preflight, show_timesteps
from ltx2_tuner.training.logs import Trackers

logger = logging.getLogger(__name__)
_PRIVATE = ("token", "key", "path", "dir", "root", "checkpoint", "file", "weights", "config", "manifest", "cache")


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser("ltx2_train_network", __doc__)
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
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_with_config(build_parser(), argv)
    if args.show_timesteps and not args.output_dir:
        args.output_dir = "."
    config = training_config(args, _mixed_precision(args))
    processes = _join_processes(args)
    if not processes.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    _allow_fast_kernels(args)
    sources = open_sources(config, processes)
    if config.strategy == "v2v":
        check_reference_lengths(args, sources.training.inventories)
    if args.show_timesteps:
        draws = settle_draws(config.draws, sources.version)
        print(show_timesteps(draws.sampler, sources.training, config, args.show_timesteps))
        return 0
    if args.debug_dataset:
        for line in dataset_lines(sources.training):
            print(line)
        return 0
    _prepare_output(args, config, processes)
    previewer = make_previewer(args, config, sources, processes) if args.sample_prompts else None
    trackers = Trackers(
        config.logs,
        is_main=processes.is_main,
        config=_public_flags(args) if args.log_config else None,
        wandb_key=args.wandb_api_key,
    )
    try:
        trainer = build(config, processes, sources, trackers, previewer)
        if args.preflight_only:
            for line in preflight(trainer, sources):
                print(line)
            return 0
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(_memory_advice(args, processes.device)) from error
    finally:
        trackers.close()
    return 0


def _memory_advice(args: argparse.Namespace, device: torch.device) -> str:
    """What to try after running out of device memory, cheapest first, without what is on already."""
    advice = []
    if not args.gradient_checkpointing:
        advice.append("--gradient_checkpointing")
    if not (args.fp8_base or args.nf4_base):
        advice.append("--fp8_base --fp8_scaled")
    if not args.blocks_to_swap:
        advice.append("--blocks_to_swap 20 (or more)")
    if not args.gradient_checkpointing_cpu_offload:
        advice.append("--gradient_checkpointing_cpu_offload")
    if not args.nf4_base:
        advice.append("--nf4_base")
    advice.append("a smaller resolution, batch_size or target_frames")
    return f"{device} ran out of memory; try, in this order: {', '.join(advice)}"


def _mixed_precision(args: argparse.Namespace) -> str:
    """The typed autocast dtype, else the launcher's."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _join_processes(args: argparse.Namespace) -> Processes:
    """This process's device and rank, as `accelerate launch` set them up (one process without it)."""
    prepare_torchaudio()
    from accelerate import PartialState

    chosen = values.device(args.device) if args.device else None
    timeout = {} if args.ddp_timeout is None else {"timeout": datetime.timedelta(minutes=args.ddp_timeout)}
    state = PartialState(cpu=chosen is not None and chosen.type == "cpu", **timeout)
    device = state.device if chosen is None or chosen.index is None else chosen
    return Processes(torch.device(device), state.process_index, state.num_processes, state.wait_for_everyone)


def _allow_fast_kernels(args: argparse.Namespace) -> None:
    if args.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def _prepare_output(args: argparse.Namespace, config: TrainingConfig, processes: Processes) -> None:
    """Make the output folder and keep the run's flags there.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    if not processes.is_main:
        return
    folder = config.save.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_effective(args, Path(folder) / f"{config.save.output_name}.config.toml")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written to ({error.strerror}); give another one") from error


def _public_flags(args: argparse.Namespace) -> dict[str, object]:
    """The flags without secrets and paths, for trackers."""
    return {
        name: value
        for name, value in vars(args).items()
        if value is not None and not any(part in name for part in _PRIVATE)
    }


if __name__ == "__main__":
    raise SystemExit(main())
