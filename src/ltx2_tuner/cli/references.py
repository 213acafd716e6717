"""What --ic_lora_strategy comes to, and which reference flags go with it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.cli.arguments_network import STRATEGY_ALIASES
from ltx2_tuner.data.config import DatasetConfig
from ltx2_tuner.data.inventory import Inventory
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.targets import resolve_strategy
from ltx2_tuner.training.modes import AudioReferenceOptions

logger = logging.getLogger(__name__)

SWITCHES = (
    "audio_ref_use_negative_positions",
    "audio_ref_mask_cross_attention_to_reference",
    "audio_ref_mask_reference_from_text_attention",
)
VIDEO_ONLY = "v2v training is video-only; use --ltx2_mode video"
NEEDS_SOUND = "reference sound needs --ltx2_mode av or audio"


def wanted_strategy(args: argparse.Namespace, preset: str, errors: list[str]) -> str:
    """The strategy by the flags alone; v2v is a wish until the datasets are known.

    Args:
        preset: the settled --lora_target_preset, which `auto` follows.
        errors: a sentence is added when the mode cannot do it.
    """
    strategy = resolve_strategy(args.ic_lora_strategy, preset, has_references=True)
    if strategy == "audio_ref_only_ic" == preset and args.ic_lora_strategy == "auto" and args.ltx2_mode == "video":
        errors.append(f"--lora_target_preset {preset}: {NEEDS_SOUND}")
    return strategy


def settle_strategy(args: argparse.Namespace, strategy: str, data: DatasetConfig) -> str:
    """The strategy that the datasets allow.

    Raises:
        UserError: a dataset has no place for the references that the strategy needs, or the mode cannot use them.
    """
    pictures = any(dataset.reference_cache_directory for dataset in data.datasets)
    sounds = any(dataset.reference_audio_cache_directory for dataset in data.datasets)
    if strategy == "v2v":
        if not pictures and args.ic_lora_strategy == "auto":
            logger.info("preset v2v without reference caches: trained as plain video")
            return "none"
        if args.ltx2_mode != "video":
            raise UserError(f"--lora_target_preset v2v with references: {VIDEO_ONLY}, not {args.ltx2_mode}")
        _require(data, strategy, "reference_cache_directory", "reference_directory")
    elif strategy == "audio_ref_only_ic":
        _require(data, strategy, "reference_audio_cache_directory", "reference_audio_directory")
    if pictures and strategy != "v2v":
        logger.warning("the datasets have references, which are ignored without --ic_lora_strategy v2v")
    if sounds and strategy != "audio_ref_only_ic":
        logger.warning(
            "the datasets have reference sound, which is ignored without --ic_lora_strategy audio_ref_only_ic"
        )
    return strategy


def _require(data: DatasetConfig, strategy: str, caches: str, sources: str) -> None:
    """Every dataset that can have references has a place for them; pictures have no sound to refer to."""
    for dataset in data.all:
        if strategy == "audio_ref_only_ic" and dataset.kind == "image":
            continue
        if getattr(dataset, caches) is None:
            raise UserError(
                f"{data.path}: --ic_lora_strategy {strategy} needs {sources} and {caches} in {dataset.label}; "
                "add them and run ltx2_cache_latents.py"
            )


def audio_reference_options(args: argparse.Namespace, strategy: str) -> AudioReferenceOptions:
    """The three --audio_ref_* switches; all off outside the strategy."""
    if strategy != "audio_ref_only_ic":
        return AudioReferenceOptions()
    return AudioReferenceOptions(*(getattr(args, name) for name in SWITCHES))


def say_references(args: argparse.Namespace, strategy: str) -> None:
    """Tell which reference flags are on, and which have no effect."""
    on = [name for name in SWITCHES if getattr(args, name)]
    if strategy != "audio_ref_only_ic":
        for name in [*on, *(["audio_ref_identity_guidance_scale"] * bool(args.audio_ref_identity_guidance_scale))]:
            logger.warning("--%s has no effect without --ic_lora_strategy audio_ref_only_ic", name)
        return
    logger.info(
        "audio references: %s; the published ID-LoRA recipe uses all three switches, rank 128, alpha 128 and "
        "--ltx2_first_frame_conditioning_p 0.9",
        ", ".join(f"--{name}" for name in on) or "no --audio_ref_* switch is on",
    )
    if args.ltx2_mode == "audio" and args.audio_ref_mask_cross_attention_to_reference:
        logger.info("--audio_ref_mask_cross_attention_to_reference changes nothing in audio mode: there is no picture")


@dataclasses.dataclass(frozen=True)
class LoRAReferences:
    """What LoRA files say about the references they were trained with; None where they say nothing."""

    strategy: str | None = None
    downscale: int | None = None
    negative_positions: bool = False


def lora_references(paths: Sequence[str]) -> LoRAReferences:
    """What the metadata of LoRA files says about references.

    Raises:
        UserError: a file cannot be read, or two were trained for different references.
    """
    found = LoRAReferences()
    for path in paths:
        with SafetensorsFile(path) as file:
            said = _references_of(file.metadata)
        for name in ("strategy", "downscale"):
            values = {getattr(found, name), getattr(said, name)} - {None}
            if len(values) > 1:
                flag = {"strategy": "--ic_lora_strategy", "downscale": "--reference_downscale"}[name]
                raise UserError(
                    f"{path}: was trained with {flag} {getattr(said, name)}, another LoRA with "
                    f"{getattr(found, name)}; use one of them at a time"
                )
        found = LoRAReferences(
            found.strategy or said.strategy,
            found.downscale or said.downscale,
            found.negative_positions or said.negative_positions,
        )
    return found


def _references_of(metadata: Mapping[str, str]) -> LoRAReferences:
    strategy = metadata.get("ss_ic_lora_strategy")
    strategy = STRATEGY_ALIASES.get(strategy, strategy)
    if strategy is None and metadata.get("ss_v2v_training") == "True":
        strategy = "v2v"
    factors = ("ss_reference_downscale_factor", "reference_downscale_factor", "reference_spatial_scale_factor")
    factor = next((metadata[name] for name in factors if metadata.get(name, "").isdecimal()), None)
    return LoRAReferences(
        strategy if strategy in ("v2v", "audio_ref_only_ic") else None,
        int(factor) if factor and int(factor) > 0 else None,
        metadata.get("ss_audio_ref_use_negative_positions") == "True",
    )


def cached_reference_frames(inventories: Sequence[Inventory]) -> int | None:
    """How many frames the cached references have; None where that is not known or differs."""
    counts = {
        found.headers[item.reference_path].metadata.get("reference_frames")
        for found in inventories
        for item in found.items
        if item.reference_path is not None
    }
    count = counts.pop() if len(counts) == 1 else None
    return int(count) if count and count.isdigit() else None


def check_reference_lengths(args: argparse.Namespace, inventories: Sequence[Inventory]) -> None:
    """Warn about references that are longer than their targets, and about samples with another reference length."""
    longer = [
        item.key
        for found in inventories
        for item in found.items
        if item.reference_path is not None and found.headers[item.reference_path].shape[1] > item.latent_shape[1]
    ]
    if longer:
        logger.warning(
            "%d items are shorter than their references, whose end has no counterpart in them: %s; use longer "
            "target_frames or fewer reference_frames",
            len(longer),
            ", ".join(longer[:5]) + (", ..." if len(longer) > 5 else ""),
        )
    cached = cached_reference_frames(inventories)
    if args.sample_prompts and args.reference_frames is not None and cached not in (None, args.reference_frames):
        logger.warning(
            "the caches hold references of %d frames, samples are made with --reference_frames %d",
            cached,
            args.reference_frames,
        )
