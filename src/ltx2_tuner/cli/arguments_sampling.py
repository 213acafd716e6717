"""Flags of previews and of ltx2_generate_video.py, and the options they make."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.models.video_vae.tiling import TileConfig
from ltx2_tuner.sampling.options import PRESETS, GuidanceOverrides, SamplingOptions, TwoStageOptions, is_distilled

logger = logging.getLogger(__name__)


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """When the trainer makes previews, and their default size."""
    group = parser.add_argument_group("samples during training")
    group.add_argument(
        "--sample_prompts", metavar="FILE", help="prompt file (.txt, .toml or .json); no samples without it"
    )
    group.add_argument("--sample_at_first", action="store_true", help="sample before the first step")
    group.add_argument("--sample_every_n_steps", type=int, metavar="N", help="sample after every N optimizer steps")
    group.add_argument("--sample_every_n_epochs", type=int, metavar="N", help="sample after every N epochs")
    group.add_argument("--height", type=int, default=512, help="default height in pixels, floored to 32")
    group.add_argument("--width", type=int, default=768, help="default width in pixels, floored to 32")
    group.add_argument("--sample_num_frames", type=int, default=45, help="default frame count, floored to 8n+1")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How samples are made: shared by the trainer, the slider trainer and the generator."""
    group = parser.add_argument_group("sampling")
    flag, number = {"action": "store_true"}, {"type": int}
    group.add_argument("--sample_with_offloading", **flag, help="move the transformer to the CPU while decoding")
    group.add_argument("--sample_tiled_vae", **flag, help="decode in tiles (less memory)")
    group.add_argument("--sample_vae_tile_size", **number, default=512, help="tile side in pixels, a multiple of 32")
    group.add_argument(
        "--sample_vae_tile_overlap", **number, default=64, help="tile overlap in pixels, a multiple of 32"
    )
    group.add_argument("--sample_vae_temporal_tile_size", **number, default=0, help="frames a tile; 0: whole clip")
    group.add_argument("--sample_vae_temporal_tile_overlap", **number, default=8, help="frames shared by two tiles")
    group.add_argument("--sample_merge_audio", **flag, help="also write *_av.mp4 with picture and sound")
    group.add_argument("--sample_audio_only", **flag, help="make sound alone (modes av and audio)")
    group.add_argument("--sample_disable_audio", **flag, help="make no sound")
    group.add_argument(
        "--sample_audio_subprocess",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode sound in a child process",
    )
    group.add_argument("--sample_disable_flash_attn", **flag, help="use torch attention while sampling")
    group.add_argument(
        "--sample_i2v_token_timestep_mask",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="give the tokens of a first-frame image timestep 0",
    )
    group.add_argument("--sample_include_reference", **flag, help="put the reference left of the result (v2v)")
    group.add_argument(
        "--use_precached_sample_prompts",
        "--precache_sample_prompts",
        **flag,
        help="the prompts must come from --sample_prompts_cache (training uses one that fits without this flag, too)",
    )
    group.add_argument(
        "--sample_prompts_cache", metavar="FILE", help="default: ltx2_sample_prompts_cache.pt in the cache directory"
    )
    group.add_argument(
        "--use_precached_sample_latents", **flag, help="read conditioning latents from --sample_latents_cache"
    )
    group.add_argument(
        "--sample_latents_cache", metavar="FILE", help="default: ltx2_sample_latents_cache.pt in the cache directory"
    )
    group.add_argument("--sample_two_stage", **flag, help="half size first, then upsampled and refined")
    group.add_argument("--spatial_upsampler_path", metavar="FILE", help="x2 latent upsampler for --sample_two_stage")
    group.add_argument("--distilled_lora_path", metavar="FILE", help="LoRA that is active in the second stage only")
    group.add_argument("--sample_stage2_steps", **number, default=3, help="steps of the second stage")
    group.add_argument("--sample_sampling_preset", choices=sorted(PRESETS), help="steps, scales and negative prompt")
    for name, meaning in (
        ("video_cfg_scale", "weight of the prompt for the picture"),
        ("audio_cfg_scale", "weight of the prompt for the sound"),
        ("video_modality_scale", "weight of the sound's influence on the picture"),
        ("audio_modality_scale", "weight of the picture's influence on the sound"),
        ("video_rescale_scale", "0 to 1: bring the picture's spread back after guidance"),
        ("audio_rescale_scale", "0 to 1: bring the sound's spread back after guidance"),
        ("stg_scale", "weight of spatio-temporal guidance; 0 is off"),
    ):
        group.add_argument(f"--{name}", type=float, help=meaning)
    group.add_argument("--stg_blocks", type=int, nargs="*", help="blocks of the STG pass (29 for 2.0, 28 for 2.3)")


def check_sampling(args: argparse.Namespace, mode: str) -> list[str]:
    """Sentences about flags that do not go together, found before any file is opened."""
    errors = []
    if args.sample_audio_only and args.sample_disable_audio:
        errors.append("--sample_audio_only and --sample_disable_audio leave nothing to make; drop one")
    if args.sample_audio_only and mode == "video":
        errors.append("--sample_audio_only needs --ltx2_mode av or audio")
    if args.sample_tiled_vae or args.sample_vae_temporal_tile_size:
        errors += _check_tiles(args)
    errors += _check_two_stage(args, mode)
    if getattr(args, "sample_prompts", None) is None:
        errors += [
            f"--{name} needs --sample_prompts"
            for name in ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
            if getattr(args, name, None)
        ]
    for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_num_frames", "height", "width"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            errors.append(f"--{name} must be at least 1 (got {value})")
    return errors


def _check_two_stage(args: argparse.Namespace, mode: str) -> list[str]:
    if not args.sample_two_stage:
        return []
    errors = []
    if mode == "audio" or args.sample_audio_only:
        errors.append("--sample_two_stage needs a picture; drop it, or make more than sound")
    if args.sample_stage2_steps < 1:
        errors.append(f"--sample_stage2_steps must be at least 1 (got {args.sample_stage2_steps})")
    if not args.spatial_upsampler_path:
        errors.append("--sample_two_stage needs --spatial_upsampler_path")
    for name in ("spatial_upsampler_path", "distilled_lora_path"):
        path = getattr(args, name)
        if path and not Path(path).is_file():
            errors.append(f"--{name} {path}: there is no such file")
    return errors


def _check_tiles(args: argparse.Namespace) -> list[str]:
    errors = []
    rows = [("sample_vae_tile", "size", "overlap", 64, 32)]
    if args.sample_vae_temporal_tile_size:
        rows.append(("sample_vae_temporal_tile", "size", "overlap", 16, 8))
    for stem, size_name, overlap_name, smallest, multiple in rows:
        size, overlap = getattr(args, f"{stem}_{size_name}"), getattr(args, f"{stem}_{overlap_name}")
        if size < smallest or size % multiple:
            errors.append(f"--{stem}_size must be a multiple of {multiple} and at least {smallest} (got {size})")
        elif overlap % multiple or not 0 <= overlap < size:
            errors.append(f"--{stem}_overlap must be a multiple of {multiple} below the tile size (got {overlap})")
    return errors


def sampling_options(
    args: argparse.Namespace,
    *,
    mode: str,
    version: str,
    checkpoint: str | Path,
    loras: Sequence[str | Path] = (),
    strategy: str | None = None,
) -> SamplingOptions:
    """The run's sampling defaults from parsed flags; the strategy says which references count."""
    blocks = args.stg_blocks
    if args.sample_merge_audio and (mode == "video" or args.sample_disable_audio):
        reason = "--sample_disable_audio" if mode != "video" else "--ltx2_mode video; sound takes --ltx2_mode av"
        logger.info("--sample_merge_audio has no effect: no sound is made with %s", reason)
    return SamplingOptions(
        mode=mode,
        version=version,
        width=args.width,
        height=args.height,
        frames=args.sample_num_frames,
        guidance_scale=getattr(args, "guidance_scale", None),
        preset=args.sample_sampling_preset,
        overrides=GuidanceOverrides(
            video_cfg=args.video_cfg_scale,
            audio_cfg=args.audio_cfg_scale,
            video_modality=args.video_modality_scale,
            audio_modality=args.audio_modality_scale,
            video_rescale=args.video_rescale_scale,
            audio_rescale=args.audio_rescale_scale,
            stg=args.stg_scale,
            stg_blocks=None if blocks is None else tuple(blocks),
        ),
        distilled=is_distilled(checkpoint, *loras),
        tiles=_tiles(args),
        offload=args.sample_with_offloading,
        merge_audio=args.sample_merge_audio,
        audio_only=args.sample_audio_only,
        disable_audio=args.sample_disable_audio,
        audio_subprocess=args.sample_audio_subprocess,
        clean_timesteps=args.sample_i2v_token_timestep_mask,
        torch_attention=args.sample_disable_flash_attn,
        include_reference=args.sample_include_reference,
        strategy=strategy,
        two_stage=_two_stage(args),
        reference_downscale=getattr(args, "reference_downscale", 1) or 1,
        reference_frames=getattr(args, "reference_frames", 1) or 1,
        audio_ref_negative_positions=getattr(args, "audio_ref_use_negative_positions", False),
        audio_ref_identity_guidance=getattr(args, "audio_ref_identity_guidance_scale", 0.0) or 0.0,
    )


def _two_stage(args: argparse.Namespace) -> TwoStageOptions | None:
    if not args.sample_two_stage:
        for name in ("spatial_upsampler_path", "distilled_lora_path"):
            if getattr(args, name):
                logger.warning("--%s has no effect without --sample_two_stage", name)
        return None
    distilled = Path(args.distilled_lora_path) if args.distilled_lora_path else None
    return TwoStageOptions(Path(args.spatial_upsampler_path), distilled, args.sample_stage2_steps)


def _tiles(args: argparse.Namespace) -> TileConfig | None:
    chunk = getattr(args, "vae_chunk_size", None)
    if not args.sample_tiled_vae and chunk is None:
        return None
    if not args.sample_tiled_vae:
        return TileConfig(chunk_size=chunk)
    temporal = args.sample_vae_temporal_tile_size or None
    return TileConfig(
        spatial_size=args.sample_vae_tile_size,
        spatial_overlap=args.sample_vae_tile_overlap,
        temporal_size=temporal,
        temporal_overlap=args.sample_vae_temporal_tile_overlap if temporal else 0,
        chunk_size=chunk,
    )
