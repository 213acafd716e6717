"""From the parsed flags of ltx2_train_network.py to the typed configuration, with all mistakes found at once."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

import torch

from ltx2_tuner.cli import arguments_memory as memory
from ltx2_tuner.cli import arguments_network as network
from ltx2_tuner.cli import arguments_optimizer as optimizer
from ltx2_tuner.cli import arguments_output as output
from ltx2_tuner.cli import arguments_training as training
from ltx2_tuner.cli import references
from ltx2_tuner.cli.arguments_gemma import check_gemma
from ltx2_tuner.cli.arguments_sampling import check_sampling
from ltx2_tuner.cli.precached import prompt_source_errors
from ltx2_tuner.cli.regularizers import regularizer_options
from ltx2_tuner.data.batches import BatchOptions
from ltx2_tuner.data.config import DatasetConfig, load_dataset_config
from ltx2_tuner.data.manifest import load_manifest
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.metadata import MetadataOptions
from ltx2_tuner.training.modes import ModeOptions
from ltx2_tuner.training.options import LoopOptions, SampleOptions
from ltx2_tuner.training.sliders import SliderConfig, slider_data
from ltx2_tuner.training.sources import TrainingConfig

logger = logging.getLogger(__name__)


def training_config(
    args: argparse.Namespace, mixed_precision: str, slider: SliderConfig | None = None
) -> TrainingConfig:
    """The run's configuration.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`, as typed or as the launcher says.
        slider: what a slider run learns in place of datasets.

    Raises:
        UserError: every mistake of the flags in one message; or those of the dataset file.
    """
    errors: list[str] = []
    errors += training.check_training(args, needs_data=slider is None)
    errors += memory.check_memory(args)
    errors += output.check_output(args)
    errors += check_gemma(args)
    errors += check_sampling(args, args.ltx2_mode)
    errors += _check_samples(args)
    errors += optimizer.loop_errors(args, mixed_precision)
    workers = optimizer.loader_workers(args, errors)
    optimizer_options = optimizer.optimizer_options(args, errors)
    scheduler_options = optimizer.scheduler_options(args, errors)
    network_options = network.network_options(args, args.ltx2_mode, errors)
    strategy = references.wanted_strategy(args, network_options.preset, errors)
    regularizers = regularizer_options(args, errors)
    errors += prompt_source_errors(args, regularizers.preservation.needs_prompts, lambda: _first_cache(args, slider))
    if errors:
        raise UserError("\n  ".join(["these flags need attention:", *errors]) if len(errors) > 1 else errors[0])
    for note in [*training.training_notes(args), *memory.memory_warnings(args), *output.output_notes(args)]:
        logger.warning("%s", note)
    data = load_data(args) if slider is None else slider_data(slider, args.ltx2_mode)
    strategy = references.settle_strategy(args, strategy, data) if slider is None else f"slider_{slider.mode}"
    references.say_references(args, strategy)
    seed = _seed(args)
    return TrainingConfig(
        checkpoint=Path(args.ltx2_checkpoint or args.dit).expanduser(),
        mode=args.ltx2_mode,
        data=data,
        network=network_options,
        optimizer=optimizer_options,
        scheduler=scheduler_options,
        loop=LoopOptions(
            seed=seed,
            max_steps=args.max_train_steps,
            max_epochs=args.max_train_epochs,
            accumulation=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            scale_weight_norms=args.scale_weight_norms,
            nan_check=args.nan_check,
        ),
        save=output.save_options(args),
        strategy=strategy,
        version=args.ltx_version,
        version_check=args.ltx_version_check_mode,
        cache_check=args.cache_check_mode,
        audio_only_model=args.ltx2_audio_only_model,
        dtype=args.dit_dtype,
        mixed_precision=mixed_precision,
        adapter_dtype=torch.float16 if args.full_fp16 else torch.bfloat16 if args.full_bf16 else torch.float32,
        precision=memory.precision_options(args, network_options.dim),
        memory=memory.memory_options(args),
        compilation=memory.compile_options(args),
        batches=BatchOptions(
            references=strategy == "v2v",
            reference_audio=strategy == "audio_ref_only_ic",
            timestep_buckets=0 if args.preserve_distribution_shape else args.num_timestep_buckets or 0,
            audio_quota=args.min_audio_batches_per_accum,
            accumulation=args.gradient_accumulation_steps,
            audio_probability=args.audio_batch_probability,
            dino=regularizers.crepa is not None and regularizers.crepa.mode == "dino",
            silence=args.audio_silence_regularizer,
        ),
        workers=workers,
        persistent_workers=args.persistent_data_loader_workers is not False,
        modes=ModeOptions(
            video_weight=args.video_loss_weight,
            audio_weight=args.audio_loss_weight,
            independent_audio=args.independent_audio_timestep,
            sequence_resolution=args.audio_only_sequence_resolution,
            silence_regularizer=args.audio_silence_regularizer,
            silence_weight=args.audio_silence_regularizer_weight,
            reference_downscale=args.reference_downscale,
            audio_reference=references.audio_reference_options(args, strategy),
        ),
        draws=training.draw_options(args, "auto"),
        loss=training.loss_options(args),
        regularizers=regularizers,
        validation=output.validation_options(args),
        samples=SampleOptions(args.sample_at_first, args.sample_every_n_steps, args.sample_every_n_epochs),
        logs=output.log_options(args),
        metadata=MetadataOptions(args.training_comment, args.no_metadata, output.modelspec(args)),
        resume=Path(args.resume).expanduser() if args.resume and not args.resume_from_huggingface else None,
        autoresume=args.autoresume,
        slider=None if slider is None else slider.facts(),
        upload=output.upload_options(args),
    )


def load_data(args: argparse.Namespace) -> DatasetConfig:
    """The dataset file or manifest; only caches are needed."""
    typed = {
        "separate_audio_buckets": args.separate_audio_buckets or None,
        "audio_bucket_strategy": args.audio_bucket_strategy,
        "audio_bucket_interval": args.audio_bucket_interval,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    if args.dataset_manifest:
        return load_manifest(args.dataset_manifest, args.ltx2_mode, typed=typed)
    return load_dataset_config(
        args.dataset_config,
        args.ltx2_mode,
        purpose="training",
        typed=typed,
        reference_downscale=args.reference_downscale,
    )


def _first_cache(args: argparse.Namespace, slider: SliderConfig | None) -> Path | None:
    """The directory where prompts may be cached; None where the datasets cannot be read, which is told later."""
    try:
        data = load_data(args) if slider is None else slider_data(slider, args.ltx2_mode)
    except UserError:
        return None
    return data.datasets[0].cache_directory if data.datasets else None


def _check_samples(args: argparse.Namespace) -> list[str]:
    if not args.sample_prompts:
        return []
    errors = []
    if not Path(args.sample_prompts).is_file():
        errors.append(f"--sample_prompts {args.sample_prompts}: there is no such file")
    if not (args.sample_at_first or args.sample_every_n_steps or args.sample_every_n_epochs):
        errors.append("--sample_prompts needs --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first")
    return errors


def _seed(args: argparse.Namespace) -> int:
    if args.seed is not None:
        return args.seed
    seed = random.SystemRandom().randrange(2**31)
    logger.info("--seed is not given: %d", seed)
    return seed
