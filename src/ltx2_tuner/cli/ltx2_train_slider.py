"""Train a slider LoRA: one direction, from pairs of prompts or of cached pictures, strengthened by the multiplier."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import add_arguments
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.cli.previews import load_encoder
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.cli.training_run import carry_out, command_words, join_processes, mixed_precision
from ltx2_tuner.data.fingerprints import check_caches
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.training.sliders import (
    Geometry,
    ReferencePairs,
    SliderConfig,
    SliderTrainer,
    TargetTexts,
    TextTargets,
    load_slider_config,
    parse_range,
)
from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig, expected_caches, open_checkpoint

if TYPE_CHECKING:
    from ltx2_tuner.text_encoding import TextEncoder

logger = logging.getLogger(__name__)

# Flags of the other training that mean nothing here: said, then ignored.
_WITHOUT_EFFECT = (
    *("dataset_config", "dataset_manifest", "ltx2_audio_only_model"),
    *("validate_every_n_steps", "validate_every_n_epochs"),
    *("separate_audio_buckets", "audio_bucket_strategy", "audio_bucket_interval", "num_timestep_buckets"),
    *("min_audio_batches_per_accum", "audio_batch_probability"),
    *("caption_dropout_rate", "caption_dropout_mode"),
    *("crepa", "self_flow"),
    *("ic_lora_strategy", "reference_downscale", "reference_frames"),
    *("audio_ref_use_negative_positions", "audio_ref_mask_cross_attention_to_reference"),
    *("audio_ref_mask_reference_from_text_attention", "audio_ref_identity_guidance_scale"),
    *("audio_silence_regularizer", "audio_supervision_mode", "independent_audio_timestep"),
    "audio_loss_balance_mode",
)
_PRESERVATION = ("blank_preservation", "dop", "prior_divergence", "audio_dop")
_TEXT_ONLY = ("latent_frames", "latent_height", "latent_width")
_UNSTABLE_GUIDANCE = 3.0


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser("ltx2_train_slider", __doc__)
    group = parser.add_argument_group("slider")
    group.add_argument("--slider_config", metavar="TOML", help="which direction is learned, and from what")
    group.add_argument("--latent_frames", type=int, default=1, help="mode text: latent frames (1 is a picture)")
    group.add_argument("--latent_height", type=int, default=512, help="mode text: pixels, a multiple of 32")
    group.add_argument("--latent_width", type=int, default=768, help="mode text: pixels, a multiple of 32")
    group.add_argument("--guidance_strength", type=float, help="factor of the direction, in place of the file's")
    group.add_argument(
        "--sample_slider_range", metavar="A,B,C", help="multipliers of the previews, in place of the file's"
    )
    add_arguments(parser)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parse_with_config(parser, join_ranges(sys.argv[1:] if argv is None else argv))
    _ignore(args, parser)
    slider = _slider(args)
    config = training_config(args, mixed_precision(args), slider)
    processes = join_processes(args)
    sources, encoder = _open_sources(args, config, slider, processes)
    make_trainer = functools.partial(SliderTrainer, multipliers=slider.multipliers)
    return carry_out(args, config, processes, sources, make_trainer, encoder, command_words(parser, argv))


def join_ranges(argv: Sequence[str]) -> list[str]:
    """`--sample_slider_range -2,0` as one token, so that its value is not taken for a flag."""
    joined: list[str] = []
    for token in map(str, argv):
        if joined and joined[-1] == "--sample_slider_range":
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _ignore(args: argparse.Namespace, parser: Parser) -> None:
    """Put flags without effect back to their defaults, saying so."""
    typed = [name for name in _WITHOUT_EFFECT if getattr(args, name) != parser.get_default(name)]
    if typed:
        logger.info("sliders do not use %s", ", ".join(f"--{name}" for name in typed))
    for name in typed:
        setattr(args, name, parser.get_default(name))


def _slider(args: argparse.Namespace) -> SliderConfig:
    """The slider file with what was typed in its place.

    Raises:
        UserError: all mistakes of the slider's own flags.
    """
    errors = [f"--{name} does not go with sliders; drop it" for name in _PRESERVATION if getattr(args, name)]
    if not args.slider_config:
        errors.append("--slider_config is needed")
    if args.ltx2_mode == "audio":
        errors.append("sliders train the picture; use --ltx2_mode video, or av to hear the previews")
    if args.latent_frames < 1:
        errors.append(f"--latent_frames must be at least 1 (got {args.latent_frames})")
    for name in ("latent_height", "latent_width"):
        pixels = getattr(args, name)
        if pixels < 32 or pixels % 32:
            errors.append(f"--{name} must be a multiple of 32 (got {pixels})")
    multipliers = None
    if args.sample_slider_range is not None:
        try:
            multipliers = parse_range(args.sample_slider_range)
        except ValueError:
            errors.append(f"--sample_slider_range {args.sample_slider_range!r}: give numbers such as -2,-1,0,1,2")
    if errors:
        raise UserError("\n  ".join(["these flags need attention:", *errors]) if len(errors) > 1 else errors[0])
    slider = load_slider_config(args.slider_config)
    if args.guidance_strength is not None:
        slider = dataclasses.replace(slider, guidance=args.guidance_strength)
    if multipliers is not None:
        slider = dataclasses.replace(slider, multipliers=multipliers)
    _check_text(args, slider)
    return slider


def _check_text(args: argparse.Namespace, slider: SliderConfig) -> None:
    if slider.mode == "reference":
        typed = [name for name in _TEXT_ONLY if getattr(args, name) != build_parser().get_default(name)]
        if args.guidance_strength is not None:
            typed.append("guidance_strength")
        if typed:
            logger.info("mode reference does not use %s", ", ".join(f"--{name}" for name in typed))
        return
    if not (args.gemma_root or args.gemma_safetensors):
        raise UserError(f"{slider.path}: mode text encodes its prompts; give --gemma_root or --gemma_safetensors")
    if abs(slider.guidance) > _UNSTABLE_GUIDANCE:
        logger.warning("guidance_strength %g is high; 1 to 3 trains steadily", slider.guidance)


def _open_sources(
    args: argparse.Namespace, config: TrainingConfig, slider: SliderConfig, processes: Processes
) -> tuple[Sources, TextEncoder | None]:
    """The checkpoint's header and what the slider learns from; and the text encoder where previews still need it.

    Raises:
        UserError: the checkpoint, the caches or Gemma do not fit.
    """
    checkpoint, version, model = open_checkpoint(config, processes)
    if slider.mode == "reference":
        pairs = ReferencePairs(slider, config.loop.seed)
        expected = expected_caches(checkpoint, model, dataclasses.replace(config, mode="video"))
        check_caches(pairs.inventories, expected, config.cache_check)
        return Sources(checkpoint, version, model, pairs, None), None
    encoder = load_encoder(args, config, checkpoint, processes)
    try:
        targets = _text_targets(args, config, slider, model, encoder, processes)
    except BaseException:
        encoder.close()
        raise
    sources = Sources(checkpoint, version, model, targets, None)
    if args.sample_prompts and not args.use_precached_sample_prompts:
        return sources, encoder
    encoder.close()
    return sources, None


def _text_targets(
    args: argparse.Namespace,
    config: TrainingConfig,
    slider: SliderConfig,
    model: TransformerConfig,
    encoder: TextEncoder,
    processes: Processes,
) -> TextTargets:
    """Every prompt of the targets encoded once."""
    prompts = [text for target in slider.targets for text in (target.positive, target.negative, target.target_class)]
    distinct = list(dict.fromkeys(prompts))
    encoded = {text: found.video for text, found in zip(distinct, encoder.encode(distinct))}
    texts = [
        TargetTexts(encoded[target.positive], encoded[target.negative], encoded[target.target_class])
        for target in slider.targets
    ]
    return TextTargets(
        slider.targets,
        texts,
        Geometry(model.in_channels, args.latent_frames, args.latent_height // 32, args.latent_width // 32),
        fps=slider.fps,
        guidance=slider.guidance,
        seed=config.loop.seed,
        batches_per_step=config.loop.accumulation * processes.count,
    )


if __name__ == "__main__":
    sys.exit(main())
