"""Encode the clips, pictures and sounds of a dataset with the autoencoders, one cache file per item."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner.caching import previews, run
from ltx2_tuner.caching.latents import Group, LatentCaching, scan
from ltx2_tuner.caching.placeholders import Geometry
from ltx2_tuner.caching.sample_latents import write_sample_latents
from ltx2_tuner.caching.targets import LatentOptions, TargetMaker, expected_sizes
from ltx2_tuner.caching.workers import Workers
from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.cli import values
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.data.cache_names import SAMPLE_LATENTS_NAME
from ltx2_tuner.data.config import DatasetConfig, load_dataset_config
from ltx2_tuner.data.extraction import pad8
from ltx2_tuner.data.manifest import write_manifest
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.video_vae.tiling import TileConfig, TileError
from ltx2_tuner.sampling.options import SamplingOptions, settle
from ltx2_tuner.sampling.prompts import read_prompts

logger = logging.getLogger(__name__)

PATCH_PROJECTION = "model.diffusion_model.patchify_proj.weight"
VIDEO_CHANNELS = 128  # of the released models


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser("ltx2_cache_latents", __doc__)
    flag = {"action": "store_true"}
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_config", required=True, metavar="FILE", help="dataset file (.toml or .json)")
    group.add_argument(
        "--save_dataset_manifest", metavar="FILE", help="write a manifest to train from the caches alone"
    )
    group.add_argument(
        "--ltx2_mode", "--ltx_mode", type=values.mode, default="video", help="video, av (with sound) or audio"
    )

    group = parser.add_argument_group("model")
    group.add_argument("--ltx2_checkpoint", metavar="FILE", help="LTX-2 or LTX-2.3 .safetensors file")
    group.add_argument(
        "--vae", metavar="FILE", help="other file for the video autoencoder (default: --ltx2_checkpoint)"
    )
    group.add_argument(
        "--vae_dtype", type=values.dtype, default="bfloat16", help="dtype of the autoencoder and latents"
    )
    group.add_argument("--device", help="cuda where there is one, else cpu")
    group.add_argument("--vae_chunk_size", type=int, help="frames each convolution takes at a time; less memory")
    group.add_argument("--vae_spatial_tile_size", type=int, help="encode in tiles of so many pixels, a multiple of 32")
    group.add_argument("--vae_spatial_tile_overlap", type=int, default=64, help="pixels, a multiple of 32")
    group.add_argument("--vae_temporal_tile_size", type=int, help="encode in tiles of so many frames, a multiple of 8")
    group.add_argument("--vae_temporal_tile_overlap", type=int, default=24, help="frames, a multiple of 8")
    group.add_argument("--disable_cudnn_backend", **flag, help="do without cuDNN, a workaround for some AMD cards")

    group = parser.add_argument_group("sound (modes av and audio)")
    group.add_argument(
        "--ltx2_audio_source",
        choices=("video", "audio_files"),
        default="video",
        help="the track of each clip, or a sound file of the same name",
    )
    group.add_argument("--ltx2_audio_dir", metavar="FOLDER", help="where those files lie (default: beside each clip)")
    group.add_argument("--ltx2_audio_ext", default=".wav", help="preferred extension, also of reference sound")
    group.add_argument(
        "--ltx2_audio_dtype", type=values.dtype, default="float16", help="dtype of the audio autoencoder"
    )
    group.add_argument("--preserve_audio_timing", **flag, help="never stretch sound where pictures are re-timed")

    group = parser.add_argument_group("sound alone (mode audio)")
    group.add_argument(
        "--audio_only_target_resolution", type=int, help="virtual picture side in pixels, with sequence resolution 0"
    )
    group.add_argument("--audio_only_target_fps", type=float, default=25.0, help="virtual frames a second")
    group.add_argument(
        "--audio_only_sequence_resolution", type=int, default=64, help="fixed virtual side in pixels, 0 for the target"
    )
    group.add_argument(
        "--audio_video_latent_channels", type=int, help="default: what the checkpoint's transformer takes"
    )
    group.add_argument("--audio_video_latent_dtype", type=values.dtype, help="default: --ltx2_audio_dtype")

    group = parser.add_argument_group("references")
    group.add_argument("--reference_frames", type=int, help="reference frames an item, 8n+1 recommended (default: 1)")
    group.add_argument(
        "--reference_downscale", type=int, default=1, help="divisor of the reference's size; as in training"
    )

    group = parser.add_argument_group("sample prompts")
    group.add_argument("--precache_sample_latents", **flag, help="also encode what the prompts of a file condition on")
    group.add_argument("--sample_prompts", metavar="FILE", help="prompt file (.txt, .toml or .json)")
    group.add_argument(
        "--sample_latents_cache", metavar="FILE", help=f"default: {SAMPLE_LATENTS_NAME} in the first cache directory"
    )
    group.add_argument("--width", type=int, default=768, help="pixels, for prompts without --w")
    group.add_argument("--height", type=int, default=512, help="pixels, for prompts without --h")
    group.add_argument("--sample_num_frames", type=int, default=45, help="frames, for prompts without --f")

    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=int, help="clips a pass, at most (default: that of the dataset)")
    group.add_argument("--num_workers", type=int, help="decode processes, 0 for none (default: CPUs - 1)")
    group.add_argument("--skip_existing", **flag, help="keep files that are up to date, make stale ones again")
    group.add_argument("--keep_cache", **flag, help="keep cache files whose source is gone")
    group.add_argument("--dry_run", **flag, help="count items, estimate the size and exit; loads no model")
    group.add_argument("--ignore_disk_space", **flag, help="go on although the disk looks too small")
    group.add_argument("--strict", **flag, help="exit with status 1 when any item failed")
    group.add_argument(
        "--debug_mode", choices=("image", "console", "video"), help="show what would be encoded and exit"
    )
    group.add_argument("--console_width", type=int, default=80, help="columns of --debug_mode console")
    group.add_argument("--console_back", help="background colour of --debug_mode console")
    group.add_argument(
        "--console_num_images", type=int, help="items a dataset, without asking, in --debug_mode console"
    )
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the flags, before a file is opened."""
    errors = []
    looks_only = args.dry_run or args.debug_mode
    if not looks_only:
        if args.ltx2_mode != "video" and not args.ltx2_checkpoint:
            errors.append(f"--ltx2_mode {args.ltx2_mode} needs --ltx2_checkpoint: it holds the audio autoencoder")
        if not (args.ltx2_checkpoint or args.vae):
            errors.append("--ltx2_checkpoint or --vae is needed: it holds the video autoencoder")
    if args.precache_sample_latents and not args.sample_prompts:
        errors.append("--precache_sample_latents needs --sample_prompts")
    if args.sample_latents_cache and not args.precache_sample_latents:
        errors.append("--sample_latents_cache has an effect with --precache_sample_latents only; add that or drop it")
    if args.ltx2_audio_dir and args.ltx2_audio_source != "audio_files":
        errors.append("--ltx2_audio_dir needs --ltx2_audio_source audio_files")
    for name in ("vae_dtype", "ltx2_audio_dtype", "audio_video_latent_dtype"):
        chosen = getattr(args, name)
        if chosen is not None and chosen.itemsize == 1:
            errors.append(f"--{name}: the autoencoders do not run in fp8; use bfloat16, float16 or float32")
    minima = {
        "batch_size": 1,
        "num_workers": 0,
        "reference_frames": 1,
        "reference_downscale": 1,
        "audio_only_target_resolution": 32,
        "audio_video_latent_channels": 1,
        "width": 32,
        "height": 32,
        "sample_num_frames": 1,
        "console_width": 1,
        "console_num_images": 1,
    }
    for name, smallest in minima.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            errors.append(f"--{name} must be at least {smallest} (got {value})")
    if 0 != args.audio_only_sequence_resolution < 32:
        errors.append(
            f"--audio_only_sequence_resolution is 0 or at least 32 (got {args.audio_only_sequence_resolution})"
        )
    if args.audio_only_target_resolution and args.audio_only_sequence_resolution:
        errors.append("--audio_only_target_resolution has an effect with --audio_only_sequence_resolution 0 only")
    if args.audio_only_target_fps <= 0:
        errors.append(f"--audio_only_target_fps must be above 0 (got {args.audio_only_target_fps})")
    try:
        _tiles(args)
    except TileError as error:
        errors.append(str(error))
    return errors


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if errors := check(args):
        raise UserError("; ".join(errors))
    if args.disable_cudnn_backend:
        torch.backends.cudnn.enabled = False
    config = load_dataset_config(
        args.dataset_config,
        args.ltx2_mode,
        typed={"reference_frames": args.reference_frames},
        reference_downscale=args.reference_downscale,
    )
    models = None if args.debug_mode or args.dry_run else _open_models(args, config.mode)
    options = _options(args)
    frames = args.reference_frames or 1
    if pad8(frames) != frames:
        logger.warning("--reference_frames %d is not 8n+1: the last frame is held up to %d", frames, pad8(frames))
    with Workers(options.num_workers) as workers:
        groups = scan(config, options, workers)
        if args.debug_mode:
            return _preview(args, groups, workers)
        if args.dry_run:
            return _dry_run(config, groups, options)
        return _cache(args, config, groups, options, workers, models)


def _open_models(args: argparse.Namespace, mode: str) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The files with the video and the audio autoencoder, opened before any clip is looked into.

    Raises:
        UserError: a file is missing or damaged, or none is named for what the mode needs.
    """
    main_file = Checkpoint.open(args.ltx2_checkpoint) if args.ltx2_checkpoint else None
    if mode != "video" and main_file is None:
        raise UserError(f"--ltx2_mode {mode} needs --ltx2_checkpoint: it holds the audio autoencoder")
    video = None
    if mode != "audio" or args.precache_sample_latents:
        video = Checkpoint.open(args.vae) if args.vae else main_file
    return video, main_file if mode != "video" else None


def _cache(
    args: argparse.Namespace,
    config: DatasetConfig,
    groups: list[Group],
    options: LatentOptions,
    workers: Workers,
    models: tuple[Checkpoint | None, Checkpoint | None],
) -> int:
    device = values.device(args.device)
    video, audio = models
    if audio is not None and args.audio_video_latent_channels is None and PATCH_PROJECTION in audio:
        geometry = _geometry(args, audio.entry(PATCH_PROJECTION).shape[1])
        options = _options(args, geometry)
    caching = LatentCaching(config, groups, options, workers, video, audio, device)
    if args.save_dataset_manifest:
        write_manifest(args.save_dataset_manifest, config, caching.component_ids)
    if args.precache_sample_latents:
        _precache_samples(args, config, caching)
    return caching.run()


def _precache_samples(args: argparse.Namespace, config: DatasetConfig, caching: LatentCaching) -> None:
    path = Path(args.sample_latents_cache or config.datasets[0].cache_directory / SAMPLE_LATENTS_NAME)
    options = SamplingOptions(
        mode=config.mode,
        width=args.width,
        height=args.height,
        frames=args.sample_num_frames,
        tiles=caching.options.tiles,
        reference_downscale=args.reference_downscale,
        reference_frames=args.reference_frames or 1,
    )
    requests = [settle(index, prompt, options) for index, prompt in enumerate(read_prompts(args.sample_prompts))]
    sound = caching.sound_latents if config.mode != "video" else None
    write_sample_latents(path, requests, options, caching.video_latents, sound, args.ltx2_audio_dtype)


def _dry_run(config: DatasetConfig, groups: list[Group], options: LatentOptions) -> int:
    """Print what would be cached and how large it is."""
    for group in groups:
        buckets: dict[tuple[int, int, int], int] = {}
        for item in group.items:
            key = (*item.bucket, item.frames)
            buckets[key] = buckets.get(key, 0) + 1
        for (width, height, frames), count in sorted(buckets.items()):
            print(f"[{group.tally.label}] {width}x{height}, {frames} frames: {count} items")
    for line in run.summary_lines([group.tally for group in groups]):
        print(line)
    sizes = expected_sizes(TargetMaker(config, options), (item for group in groups for item in group.items))
    print(f"expected size of the latent caches: {run.size_text(sum(sizes.values()))}")
    run.check_disk_space(sizes, ignore=True)
    return 0


def _preview(args: argparse.Namespace, groups: list[Group], workers: Workers) -> int:
    for group in groups:
        if group.dataset.item_kind == "audio":
            logger.info("%s: sound has no picture to show", group.tally.label)
            continue
        shown = previews.decoded_items(group.items, workers)
        if args.debug_mode == "video":
            previews.write_previews(group.dataset, shown)
        elif args.debug_mode == "console":
            previews.print_previews(shown, args.console_width, args.console_back, args.console_num_images)
        elif not previews.show_previews(shown):
            break
        shown.close()
    return 0


def _options(args: argparse.Namespace, geometry: Geometry | None = None) -> LatentOptions:
    workers = args.num_workers if args.num_workers is not None else max(1, (os.cpu_count() or 2) - 1)
    return LatentOptions(
        vae_dtype=args.vae_dtype,
        audio_dtype=args.ltx2_audio_dtype,
        tiles=_tiles(args),
        external_sound=args.ltx2_audio_source == "audio_files",
        sound_directory=Path(args.ltx2_audio_dir) if args.ltx2_audio_dir else None,
        sound_extension=args.ltx2_audio_ext if args.ltx2_audio_ext.startswith(".") else f".{args.ltx2_audio_ext}",
        preserve_timing=args.preserve_audio_timing,
        geometry=geometry or _geometry(args, VIDEO_CHANNELS),
        reference_downscale=args.reference_downscale,
        batch_size=args.batch_size,
        num_workers=workers,
        skip_existing=args.skip_existing,
        keep_cache=args.keep_cache,
        ignore_disk_space=args.ignore_disk_space,
        strict=args.strict,
    )


def _geometry(args: argparse.Namespace, channels: int) -> Geometry:
    return Geometry(
        fps=args.audio_only_target_fps,
        sequence_resolution=args.audio_only_sequence_resolution,
        target_resolution=args.audio_only_target_resolution,
        channels=args.audio_video_latent_channels or channels,
        dtype=args.audio_video_latent_dtype or args.ltx2_audio_dtype,
    )


def _tiles(args: argparse.Namespace) -> TileConfig:
    return TileConfig.for_encoding(
        args.vae_spatial_tile_size,
        args.vae_spatial_tile_overlap,
        args.vae_temporal_tile_size,
        args.vae_temporal_tile_overlap,
        args.vae_chunk_size,
    )


if __name__ == "__main__":
    raise SystemExit(main())
