"""Encode the captions of a dataset with Gemma, one cache file per source."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner.caching.text import TextCaching, TextCachingOptions, dry_run
from ltx2_tuner.caching.text_side_files import PreservationFile, SamplePromptsFile, SideFile
from ltx2_tuner.checkpoint import Checkpoint, load_text_connectors
from ltx2_tuner.cli import values
from ltx2_tuner.cli.arguments_gemma import add_gemma_arguments, check_gemma, gemma_options
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.data.cache_names import PRESERVATION_NAME, SAMPLE_PROMPTS_NAME
from ltx2_tuner.data.config import DatasetConfig, load_dataset_config
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.text import TextConfig
from ltx2_tuner.sampling.prompts import read_prompts

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser("ltx2_cache_text_encoder_outputs", __doc__)
    add_gemma_arguments(parser)
    flag = {"action": "store_true"}
    group = parser.add_argument_group("caching")
    group.add_argument("--dataset_config", required=True, metavar="FILE", help="dataset file (.toml or .json)")
    group.add_argument(
        "--ltx2_mode", "--ltx_mode", type=values.mode, default="video", help="video, av or audio; as for the latents"
    )
    group.add_argument("--device", help="cuda where there is one, else cpu")
    group.add_argument("--mixed_precision", choices=tuple(DTYPES), default="no", help="dtype of Gemma and of the cache")
    group.add_argument("--batch_size", type=int, help="prompts a pass, at most (default: that of the dataset)")
    group.add_argument("--num_workers", type=int, default=1, help="accepted for old commands; captions need no workers")
    group.add_argument("--caption_field", help="field of a JSONL record that holds the caption (default: caption)")
    group.add_argument("--skip_existing", **flag, help="keep files that are up to date, make stale ones again")
    group.add_argument("--keep_cache", **flag, help="keep cache files whose source is gone")
    group.add_argument(
        "--legacy_text_keys", **flag, help="also write the joined copies other tools read (twice the size)"
    )
    group.add_argument("--dry_run", **flag, help="count sources, estimate the size and exit; loads no model")
    group.add_argument("--ignore_disk_space", **flag, help="go on although the disk looks too small")
    group.add_argument("--strict", **flag, help="exit with status 1 when any item failed")

    group = parser.add_argument_group("sample prompts")
    group.add_argument("--precache_sample_prompts", **flag, help="also encode the prompts of --sample_prompts")
    group.add_argument("--sample_prompts", metavar="FILE", help="prompt file (.txt, .toml or .json)")
    group.add_argument(
        "--sample_prompts_cache", metavar="FILE", help=f"default: {SAMPLE_PROMPTS_NAME} in the first cache directory"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        default=3.0,
        help="accepted for old commands; negative prompts are always encoded",
    )

    group = parser.add_argument_group("preservation prompts")
    group.add_argument("--precache_preservation_prompts", **flag, help="also encode the preservation prompts")
    group.add_argument("--blank_preservation", **flag, help="the empty prompt")
    group.add_argument("--dop", **flag, help="the prompt of --dop_class_prompt")
    group.add_argument("--dop_class_prompt", default="", help="what the subject is one of, such as 'a woman'")
    group.add_argument(
        "--preservation_prompts_cache",
        metavar="FILE",
        help=f"default: {PRESERVATION_NAME} in the first cache directory",
    )
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the flags, before a model file is opened."""
    errors = check_gemma(args, required=not args.dry_run)
    if not args.dry_run and not (args.ltx2_checkpoint or args.ltx2_text_encoder_checkpoint):
        errors.append("--ltx2_checkpoint or --ltx2_text_encoder_checkpoint is needed: it holds the text connectors")
    if args.precache_sample_prompts and not args.sample_prompts:
        errors.append("--precache_sample_prompts needs --sample_prompts")
    if args.precache_preservation_prompts and not (args.blank_preservation or args.dop):
        errors.append("--precache_preservation_prompts needs --blank_preservation, --dop or both")
    if not args.precache_preservation_prompts:
        errors += [
            f"--{name} has an effect with --precache_preservation_prompts only; add that or drop it"
            for name in ("blank_preservation", "dop", "preservation_prompts_cache")
            if getattr(args, name)
        ]
    for name, smallest in (("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            errors.append(f"--{name} must be at least {smallest} (got {value})")
    return errors


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if errors := check(args):
        raise UserError("; ".join(errors))
    device = values.device(args.device)
    config = load_dataset_config(args.dataset_config, args.ltx2_mode, typed={"caption_field": args.caption_field})
    options = TextCachingOptions(
        dtype=DTYPES[args.mixed_precision],
        batch_size=args.batch_size,
        skip_existing=args.skip_existing,
        keep_cache=args.keep_cache,
        legacy_keys=args.legacy_text_keys,
        ignore_disk_space=args.ignore_disk_space,
        strict=args.strict,
    )
    path = args.ltx2_text_encoder_checkpoint or args.ltx2_checkpoint
    if args.dry_run:
        dry_run(config, options, _text_config(path, config.mode))
        return 0
    if options.dtype == torch.float16:
        logger.warning("Gemma 3 overflows in fp16; captions that do will fail, --mixed_precision bf16 avoids it")
    side_files = _side_files(args, config)
    checkpoint = Checkpoint.open(path)
    return TextCaching(config, options, checkpoint, gemma_options(args), device, side_files).run()


def _text_config(path: str | None, mode: str) -> TextConfig:
    """Sizes of the text side; those of LTX-2.0 without a checkpoint."""
    if path is None:
        logger.info("sizes are those of LTX-2.0; give --ltx2_checkpoint for another version")
        return TextConfig.from_dict({})
    return load_text_connectors(Checkpoint.open(path), torch.device("meta"), torch.float32, mode).config


def _side_files(args: argparse.Namespace, config: DatasetConfig) -> list[SideFile]:
    directory = config.datasets[0].cache_directory
    files: list[SideFile] = []
    if args.precache_sample_prompts:
        path = Path(args.sample_prompts_cache or directory / SAMPLE_PROMPTS_NAME)
        prompts = read_prompts(args.sample_prompts)
        files.append(SamplePromptsFile(path, [(prompt.prompt, prompt.negative_prompt) for prompt in prompts]))
    elif args.sample_prompts or args.sample_prompts_cache:
        logger.warning("sample prompts are encoded with --precache_sample_prompts only")
    if args.precache_preservation_prompts:
        path = Path(args.preservation_prompts_cache or directory / PRESERVATION_NAME)
        if args.dop and not args.dop_class_prompt:
            logger.warning("--dop without --dop_class_prompt: the empty prompt is encoded as the class prompt")
        class_prompt = args.dop_class_prompt if args.dop else None
        files.append(PreservationFile(path, args.blank_preservation, class_prompt))
    return files


if __name__ == "__main__":
    raise SystemExit(main())
