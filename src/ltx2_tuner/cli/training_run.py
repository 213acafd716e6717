"""What every training script does once its configuration stands: join the processes, inspect or train, clean up."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltx2_tuner.cli import values
from ltx2_tuner.cli.arguments_memory import shards_base
from ltx2_tuner.cli.config_file import write_effective
from ltx2_tuner.cli.previews import make_previewer
from ltx2_tuner.cli.regularizers import blank_prompt, preservation_prompts
from ltx2_tuner.cli.run_record import RunRecord
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.devices import exact
from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.sharding import Peers
from ltx2_tuner.training.build import build, settle_draws
from ltx2_tuner.training.environment import check_architecture, environment_lines, memory_lines
from ltx2_tuner.training.inspect import dataset_lines, preflight, show_timesteps
from ltx2_tuner.training.logs import Trackers
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.run import Run
from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig
from ltx2_tuner.training.upload import download_state

if TYPE_CHECKING:
    from ltx2_tuner.text_encoding import TextEncoder

_PRIVATE = ("token", "key", "path", "dir", "root", "checkpoint", "file", "weights", "config", "manifest", "cache")


def carry_out(
    args: argparse.Namespace,
    config: TrainingConfig,
    processes: Processes,
    sources: Sources,
    make_trainer: Callable[[Run], Trainer] = Trainer,
    encoder: TextEncoder | None = None,
    command: Sequence[str] = (),
) -> int:
    """Show what was asked for, or train; the exit status.

    Args:
        encoder: makes the previews' text where it is loaded already.
        command: the words of the command line, for the run's report.
    """
    if args.show_timesteps:
        draws = settle_draws(config.draws, sources.version)
        print(show_timesteps(draws.sampler, sources.training, config, args.show_timesteps))
        return 0
    if args.debug_dataset:
        for line in dataset_lines(sources.training):
            print(line)
        return 0
    check_architecture(processes.device)
    if args.preflight_only:  # before the weights are read: they may be what does not fit
        for line in (*environment_lines(processes.device), *memory_lines(config, sources, processes.device)):
            print(line)
    _prepare_output(args, config, processes)
    config = _fetch_state(args, config, processes)
    previewer = make_previewer(args, config, sources, processes, encoder) if args.sample_prompts else None
    prompts = preservation_prompts(args, config, sources, processes)
    blank = blank_prompt(args, config, sources, processes)
    record = RunRecord(args, config, processes, command) if processes.is_main and not args.preflight_only else None
    trackers = Trackers(
        config.logs,
        is_main=processes.is_main,
        run_log=None if record is None else record.log,
        config=_public_flags(args) if args.log_config else None,
        wandb_key=args.wandb_api_key,
    )
    try:
        trainer = build(config, processes, sources, trackers, previewer, make_trainer, prompts, blank)
        if args.preflight_only:
            for line in preflight(trainer, sources):
                print(line)
        else:
            trainer.train()
        processes.wait()  # until here others may read this process's part of the base
    except torch.OutOfMemoryError as error:
        raise UserError(_memory_advice(args, processes.device)) from error
    finally:
        trackers.close()
        if record is not None:
            record.close()
    return 0


def _memory_advice(args: argparse.Namespace, device: torch.device) -> str:
    """What to try after running out of device memory, cheapest first, without what is on already."""
    advice = []
    if not args.gradient_checkpointing:
        advice.append("--gradient_checkpointing")
    if not (args.fp8_base or args.nf4_base):
        advice.append("--fp8_base --fp8_scaled")
    if not args.blocks_to_swap and not shards_base(args):
        advice.append("--blocks_to_swap 20 (or more)")
    if not args.gradient_checkpointing_cpu_offload:
        advice.append("--gradient_checkpointing_cpu_offload")
    if not args.nf4_base:
        advice.append("--nf4_base")
    advice.append("a smaller resolution, batch_size or target_frames")
    return f"{device} ran out of memory; try, in this order: {', '.join(advice)}"


def _fetch_state(args: argparse.Namespace, config: TrainingConfig, processes: Processes) -> TrainingConfig:
    """With --resume_from_huggingface, the configuration that resumes from the downloaded state."""
    if not (args.resume and args.resume_from_huggingface):
        return config
    target = config.save.output_dir / "from_huggingface"
    if not processes.is_main:
        processes.wait()  # the first process downloads, the others find it there
    folder = download_state(args.resume, target, args.huggingface_token)
    if processes.is_main:
        processes.wait()
    return dataclasses.replace(config, resume=folder)


def command_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """The script and its arguments, as typed."""
    return [parser.prog, *map(str, sys.argv[1:] if argv is None else argv)]


def mixed_precision(args: argparse.Namespace) -> str:
    """The typed autocast dtype, else the launcher's."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def join_processes(args: argparse.Namespace) -> Processes:
    """This process's device and rank, as `accelerate launch` set them up (one process without it)."""
    prepare_torchaudio()
    from accelerate import PartialState

    chosen = values.named_device(args.device) if args.device else None
    timeout = {} if args.ddp_timeout is None else {"timeout": datetime.timedelta(minutes=args.ddp_timeout)}
    state = PartialState(cpu=chosen is not None and chosen.type == "cpu", **timeout)
    device = exact(state.device if chosen is None or chosen.index is None else chosen)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    if not state.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    _allow_fast_kernels(args)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    return Processes(
        device,
        state.process_index,
        state.num_processes,
        state.wait_for_everyone,
        Peers(state.local_process_index, min(local, state.num_processes)),
    )


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
