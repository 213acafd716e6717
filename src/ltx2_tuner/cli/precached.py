"""Embeddings of prompts that the caching script made: taken when asked for, and unasked where they fit the run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ltx2_tuner.checkpoint import Checkpoint, component_id
from ltx2_tuner.cli.arguments_gemma import gemma_options
from ltx2_tuner.data.cache_names import PRESERVATION_NAME, SAMPLE_PROMPTS_NAME
from ltx2_tuner.errors import UserError
from ltx2_tuner.sampling.contexts import TextIdentity
from ltx2_tuner.training.sources import Sources, TrainingConfig

logger = logging.getLogger(__name__)

Prompts = TypeVar("Prompts")


def has_gemma(args: argparse.Namespace) -> bool:
    """Whether prompts can be encoded in this run."""
    return bool(args.gemma_root or args.gemma_safetensors)


def drops_captions_to_blank(args: argparse.Namespace) -> bool:
    """Whether dropped captions become the empty prompt."""
    return bool(args.caption_dropout_rate) and args.caption_dropout_mode == "empty"


def prompt_source_errors(
    args: argparse.Namespace, preserves_prompts: bool, folder: Callable[[], Path | None]
) -> list[str]:
    """Sentences about prompts that neither Gemma nor a cached file can give the run.

    Args:
        preserves_prompts: blank preservation or DOP is on.
        folder: the first cache directory; None where the datasets do not tell.
    """
    sources = "--gemma_root, --gemma_safetensors or --use_precached_preservation"
    samples, preservation = [], []
    if args.sample_prompts and not args.use_precached_sample_prompts:
        samples.append(
            "samples need --gemma_root, --gemma_safetensors or --use_precached_sample_prompts to know their prompts"
        )
    if drops_captions_to_blank(args) and not args.use_precached_preservation:
        preservation.append(f"--caption_dropout_mode empty needs {sources} to know the empty prompt's embedding")
    if preserves_prompts and not args.use_precached_preservation:
        preservation.append(f"--blank_preservation and --dop need {sources} to know their prompts")
    if has_gemma(args) or not (samples or preservation):
        return []
    default = folder()

    def is_cached(typed: str | None, name: str) -> bool:
        path = Path(typed).expanduser() if typed else default and default / name
        return path is not None and path.is_file()

    errors = [] if is_cached(args.sample_prompts_cache, SAMPLE_PROMPTS_NAME) else samples
    return errors if is_cached(args.preservation_prompts_cache, PRESERVATION_NAME) else errors + preservation


def take_precached(
    kind: str,
    read: Callable[[Path, TextIdentity], Prompts],
    args: argparse.Namespace,
    config: TrainingConfig,
    sources: Sources,
) -> Prompts | None:
    """What a cached file holds for this run; None where Gemma has to encode the prompts.

    A file that was not asked for is taken when it is known to come from this run's checkpoint (and Gemma, where one is
    given), and holds these prompts; either way the log says so.

    Args:
        kind: `sample` or `preservation` prompts.
        read: reads a file, given what it must have been made with.

    Raises:
        UserError: the file does not fit, and was asked for or is all that there is.
    """
    typed, asked, name = {
        "sample": (args.sample_prompts_cache, args.use_precached_sample_prompts, SAMPLE_PROMPTS_NAME),
        "preservation": (args.preservation_prompts_cache, args.use_precached_preservation, PRESERVATION_NAME),
    }[kind]
    if not (typed or config.data.datasets):  # a slider that learns from texts has no cache directory
        if asked:
            raise UserError(f"this run has no cache directory; name the file with --{kind}_prompts_cache")
        return None
    path = Path(typed).expanduser() if typed else config.data.datasets[0].cache_directory / name
    other = args.ltx2_text_encoder_checkpoint
    component = component_id(Checkpoint.open(other) if other else sources.checkpoint, "text")
    if asked:
        return read(path, TextIdentity(component, policy=config.cache_check))
    if not path.is_file():
        return None
    try:
        found = read(path, TextIdentity(component, _gemma_id(args) if has_gemma(args) else None, known=True))
    except UserError as error:
        if not has_gemma(args):
            raise
        logger.info("Gemma encodes the %s prompts: %s", kind, error)
        return None
    logger.info("the %s prompts come from %s, which fits this run; Gemma is not loaded for them", kind, path)
    return found


def _gemma_id(args: argparse.Namespace) -> str:
    from ltx2_tuner.text_encoding.encoder import read_gemma_id

    return read_gemma_id(gemma_options(args))
