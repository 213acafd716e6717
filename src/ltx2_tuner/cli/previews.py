"""Readies the previews of a training run, so that neither Gemma nor the encoder is in memory while it trains."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.cli.arguments_gemma import gemma_options
from ltx2_tuner.cli.arguments_sampling import sampling_options
from ltx2_tuner.cli.media_encoders import encode_conditionings
from ltx2_tuner.cli.precached import take_precached
from ltx2_tuner.cli.references import cached_reference_frames
from ltx2_tuner.data.cache_names import SAMPLE_LATENTS_NAME
from ltx2_tuner.sampling.conditioning import Conditioning, read_latent_cache
from ltx2_tuner.sampling.contexts import PromptContext, TextIdentity, encode_contexts, read_prompt_cache
from ltx2_tuner.sampling.options import Request, settle
from ltx2_tuner.sampling.preview import Previewer
from ltx2_tuner.sampling.prompts import read_prompts
from ltx2_tuner.sampling.sampler import Sampler
from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig

if TYPE_CHECKING:
    from ltx2_tuner.text_encoding import TextEncoder

logger = logging.getLogger(__name__)


def make_previewer(
    args: argparse.Namespace,
    config: TrainingConfig,
    sources: Sources,
    processes: Processes,
    encoder: TextEncoder | None = None,
) -> Previewer:
    """A previewer whose prompts and conditioning media are encoded.

    Args:
        encoder: one that is loaded already; it is closed here.

    Raises:
        UserError: the prompt file, the caches or Gemma do not fit.
    """
    options = sampling_options(
        args, mode=config.mode, version=sources.version, checkpoint=config.checkpoint, strategy=config.strategy
    )
    if args.reference_frames is None:
        frames = cached_reference_frames(sources.training.inventories) or 1
        options = dataclasses.replace(options, reference_frames=frames)
    if options.offload and config.memory.blocks_to_swap:
        logger.warning("--sample_with_offloading has no effect with --blocks_to_swap: those blocks are on the host")
    if options.offload and config.memory.shard_base:
        logger.warning("--sample_with_offloading has no effect with --shard_base: other processes read these blocks")
    offload = options.offload and not (config.memory.blocks_to_swap or config.memory.shard_base)
    options = dataclasses.replace(options, seed=config.loop.seed, offload=offload)
    blocks = sources.model.num_layers
    requests = [
        settle(index, prompt, options, num_blocks=blocks)
        for index, prompt in enumerate(read_prompts(args.sample_prompts))
    ]
    sampler = Sampler(
        sources.checkpoint,
        options,
        device=processes.device,
        dtype=config.dtype,
        vae_dtype=args.vae_dtype,
        vae_checkpoint=Checkpoint.open(args.vae) if args.vae else None,
    )
    return Previewer(
        sampler,
        requests,
        _contexts(args, config, sources, processes, requests, encoder),
        _conditionings(args, config, sources, processes, sampler, requests),
        output_dir=config.save.output_dir,
        output_name=config.save.output_name,
        rank=processes.rank,
        world_size=processes.count,
    )


def _contexts(
    args: argparse.Namespace,
    config: TrainingConfig,
    sources: Sources,
    processes: Processes,
    requests: list[Request],
    encoder: TextEncoder | None,
) -> list[PromptContext]:
    if encoder is None:
        widths = sources.model.context_width("video"), sources.model.context_width("audio")

        def read(path: Path, made_with: TextIdentity) -> list[PromptContext]:
            return read_prompt_cache(path, requests, config.mode, widths, made_with)

        found = take_precached("sample", read, args, config, sources)
        if found is not None:
            return found
    encoder = encoder or load_encoder(args, config, sources.checkpoint, processes)
    try:
        return encode_contexts(encoder, requests)
    finally:
        encoder.close()


def load_encoder(
    args: argparse.Namespace, config: TrainingConfig, checkpoint: Checkpoint, processes: Processes
) -> TextEncoder:
    """Gemma and the connectors, on this process's device."""
    from ltx2_tuner.text_encoding import load_text_encoder

    other = args.ltx2_text_encoder_checkpoint
    connectors = Checkpoint.open(other) if other else checkpoint
    return load_text_encoder(gemma_options(args), connectors, config.mode, device=processes.device, dtype=config.dtype)


def _conditionings(
    args: argparse.Namespace,
    config: TrainingConfig,
    sources: Sources,
    processes: Processes,
    sampler: Sampler,
    requests: list[Request],
) -> list[Conditioning]:
    if args.use_precached_sample_latents:
        path = args.sample_latents_cache or _cache_directory(config) / SAMPLE_LATENTS_NAME
        return read_latent_cache(path, requests, sampler.options)
    return encode_conditionings(
        requests,
        sampler.options,
        sources.checkpoint,
        vae=args.vae,
        device=processes.device,
        vae_dtype=args.vae_dtype,
    )


def _cache_directory(config: TrainingConfig) -> Path:
    return config.data.datasets[0].cache_directory
