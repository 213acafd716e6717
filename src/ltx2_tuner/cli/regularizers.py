"""From the flags of preservation, CREPA and Self-Flow to their options, and the prompts that preservation needs."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ltx2_tuner.cli.key_values import parse_key_values
from ltx2_tuner.cli.precached import drops_captions_to_blank, take_precached
from ltx2_tuner.cli.previews import load_encoder
from ltx2_tuner.errors import did_you_mean
from ltx2_tuner.sampling.contexts import TextIdentity
from ltx2_tuner.training.regularizers import CrepaOptions, PreservationOptions, RegularizerOptions, SelfFlowOptions
from ltx2_tuner.training.regularizers.options import keys_of
from ltx2_tuner.training.regularizers.prompts import PreservationPrompts, Prompt, encode_prompts, read_prompts
from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig

logger = logging.getLogger(__name__)

Options = TypeVar("Options", CrepaOptions, SelfFlowOptions)

MULTIPLIERS = {"blank_preservation": 1.0, "dop": 1.0, "prior_divergence": 0.1, "audio_dop": 0.5}
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def regularizer_options(args: argparse.Namespace, errors: list[str]) -> RegularizerOptions:
    """The options; a sentence is added to `errors` for each mistake, and what has no effect is logged."""
    for name in (*MULTIPLIERS, "crepa", "self_flow"):
        if getattr(args, f"{name}_args") and not getattr(args, name):
            logger.warning("--%s_args has no effect without --%s", name, name)
    options = RegularizerOptions(
        preservation=_preservation(args, errors),
        crepa=_read(CrepaOptions, args.crepa_args, "--crepa_args", errors) if args.crepa else None,
        self_flow=_read(SelfFlowOptions, args.self_flow_args, "--self_flow_args", errors) if args.self_flow else None,
    )
    if args.crepa and args.ltx2_mode == "audio":
        errors.append("--crepa needs a video stream; use --ltx2_mode video or av")
    if args.self_flow and args.ltx2_mode != "video":
        errors.append("Self-Flow needs --ltx2_mode video")
    _note_prompts(args, options.preservation)
    if options.self_flow is not None:
        for note in options.self_flow.notes():
            logger.warning("--self_flow_args: %s", note)
    return options


def _read(kind: type[Options], tokens: Sequence[str], flag: str, errors: list[str]) -> Options:
    """Typed options of a `key=value` list."""
    keys, values = keys_of(kind), {}
    for key, text in parse_key_values(tokens, flag, errors).items():
        if key not in keys:
            errors.append(f"{flag} {key}: unknown key{did_you_mean(key, keys)}; known are {', '.join(keys)}")
            continue
        annotation, choices = keys[key]
        try:
            values[key] = _value(text, annotation, choices)
        except ValueError as problem:
            errors.append(f"{flag} {key}={text}: {problem}")
    options = kind(**values)
    errors += [f"{flag} {problem}" for problem in options.problems()]
    return options


def _value(text: str, annotation: str, choices: Sequence[str]) -> object:
    """The value of a key.

    Raises:
        ValueError: what was expected instead.
    """
    if choices:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}{did_you_mean(text, choices)}")
        return text
    if annotation == "bool":
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError("expected true or false")
        return text.lower() in _TRUE
    if annotation == "int":
        return _parse(int, text, "a whole number")
    if annotation == "float | None" and text.lower() == "none":
        return None
    number = _parse(float, text, "a number")
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _parse(kind: type, text: str, expected: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {expected}") from None


def _preservation(args: argparse.Namespace, errors: list[str]) -> PreservationOptions:
    strengths: dict[str, float | None] = {}
    class_prompt = ""
    for name, default in MULTIPLIERS.items():
        flag, keys = f"--{name}_args", ("multiplier", "class") if name == "dop" else ("multiplier",)
        found = parse_key_values(getattr(args, f"{name}_args") if getattr(args, name) else (), flag, errors)
        for key in found.keys() - set(keys):
            errors.append(f"{flag} {key}: unknown key{did_you_mean(key, keys)}; known are {', '.join(keys)}")
        strengths[name] = _strength(name, default, found.get("multiplier"), errors) if getattr(args, name) else None
        class_prompt = found.get("class", class_prompt)
    return PreservationOptions(
        blank=strengths["blank_preservation"],
        dop=strengths["dop"],
        dop_class=class_prompt,
        prior_divergence=strengths["prior_divergence"],
        audio_dop=strengths["audio_dop"],
    )


def _strength(name: str, default: float, text: str | None, errors: list[str]) -> float | None:
    """The multiplier; None switches the technique off."""
    try:
        strength = default if text is None else float(text)
    except ValueError:
        strength = math.nan
    if not 0 <= strength < math.inf:
        errors.append(f"--{name}_args multiplier={text}: expected a finite number of at least 0")
        return None
    if strength == 0:
        logger.info("--%s is off: its multiplier is 0", name)
        return None
    return strength


def _note_prompts(args: argparse.Namespace, options: PreservationOptions) -> None:
    """What is odd about the prompts of blank preservation and DOP."""
    drops_to_blank = drops_captions_to_blank(args)
    if args.use_precached_preservation and not (options.needs_prompts or drops_to_blank):
        logger.warning("--use_precached_preservation has no effect without --blank_preservation or --dop")
    if args.preservation_prompts_cache and not (options.needs_prompts or drops_to_blank):
        logger.warning("--preservation_prompts_cache has no effect without --blank_preservation or --dop")
    if not options.needs_prompts:
        return
    if options.dop is not None and not options.dop_class and not args.use_precached_preservation:
        logger.warning("--dop: no class given, the empty prompt is preserved; --dop_args class=woman names one")
        if options.blank is not None:
            logger.warning("--dop without a class is identical to blank preservation, paid twice; drop one")


def preservation_prompts(
    args: argparse.Namespace, config: TrainingConfig, sources: Sources, processes: Processes
) -> PreservationPrompts | None:
    """The prompts of a run, encoded so that Gemma and the transformer never meet; None where none is needed.

    Raises:
        UserError: the cache file or Gemma does not fit.
    """
    options = config.regularizers.preservation
    return _prompts(args, config, sources, processes, options) if options.needs_prompts else None


def blank_prompt(
    args: argparse.Namespace, config: TrainingConfig, sources: Sources, processes: Processes
) -> Prompt | None:
    """The empty prompt that dropped captions become; None where they become zeros, or where none is dropped.

    Raises:
        UserError: the cache file or Gemma does not fit.
    """
    if not drops_captions_to_blank(args):
        return None
    return _prompts(args, config, sources, processes, PreservationOptions(blank=1.0)).blank


def _prompts(
    args: argparse.Namespace,
    config: TrainingConfig,
    sources: Sources,
    processes: Processes,
    options: PreservationOptions,
) -> PreservationPrompts:
    def read(path: Path, made_with: TextIdentity) -> PreservationPrompts:
        return read_prompts(path, options, config.mode, sources.model, made_with)

    found = take_precached("preservation", read, args, config, sources)
    if found is not None:
        return found
    encoder = load_encoder(args, config, sources.checkpoint, processes)
    try:
        return encode_prompts(options, encoder)
    finally:
        encoder.close()
