"""Cache DINOv2 features of the frames of a dataset's clips, which training with --crepa_args mode=dino reads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.caching import run
from ltx2_tuner.caching.dino import MODELS, DinoCaching, DinoOptions
from ltx2_tuner.caching.latents import scan
from ltx2_tuner.caching.targets import LatentOptions
from ltx2_tuner.caching.workers import Workers
from ltx2_tuner.cli import values
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.data.config import load_dataset_config
from ltx2_tuner.errors import UserError


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser("ltx2_cache_dino_features", __doc__)
    flag = {"action": "store_true"}
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_config", required=True, metavar="FILE", help="that of ltx2_cache_latents.py")
    group.add_argument("--reference_downscale", type=int, default=1, help="as in latent caching: it shapes the buckets")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--dino_model",
        choices=tuple(MODELS),
        default="dinov2_vitb14",
        help="as --crepa_args dino_model of the training",
    )
    group.add_argument(
        "--dino_model_path", metavar="FOLDER", help="weights in the layout of transformers (default: from the hub)"
    )
    group.add_argument("--dino_batch_size", type=int, default=16, help="frames a pass; fewer take less memory")
    group.add_argument("--device", help="cuda where there is one, else cpu")
    for name in ("dino_repo_path", "torch_hub_dir"):
        group.add_argument(f"--{name}", metavar="FOLDER", help="of other tools; use --dino_model_path")

    group = parser.add_argument_group("run")
    group.add_argument("--num_workers", type=int, help="decode processes, 0 for none (default: CPUs - 1)")
    group.add_argument("--skip_existing", **flag, help="keep files that are up to date, make stale ones again")
    group.add_argument("--keep_cache", **flag, help="keep features whose clip is gone")
    group.add_argument("--dry_run", **flag, help="count items, estimate the size and exit; loads no model")
    group.add_argument("--ignore_disk_space", **flag, help="go on although the disk looks too small")
    group.add_argument("--strict", **flag, help="exit with status 1 when any item failed")
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the flags, before a file is opened."""
    errors = [
        f"--{name} is for torch.hub, which is not used here; give --dino_model_path, a folder in transformers' layout"
        for name in ("dino_repo_path", "torch_hub_dir")
        if getattr(args, name)
    ]
    for name, smallest in (("dino_batch_size", 1), ("num_workers", 0), ("reference_downscale", 1)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            errors.append(f"--{name} must be at least {smallest} (got {value})")
    return errors


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if errors := check(args):
        raise UserError("; ".join(errors))
    # The pictures of an item are the same with and without sound.
    config = load_dataset_config(args.dataset_config, "video", reference_downscale=args.reference_downscale)
    options = DinoOptions(
        MODELS[args.dino_model],
        Path(args.dino_model_path).expanduser() if args.dino_model_path else None,
        args.dino_batch_size,
        args.skip_existing,
        args.keep_cache,
        args.ignore_disk_space,
        args.strict,
    )
    count = args.num_workers if args.num_workers is not None else max(1, (os.cpu_count() or 2) - 1)
    with Workers(count) as workers:
        groups = scan(config, LatentOptions(reference_downscale=args.reference_downscale), workers)
        caching = DinoCaching(groups, options, workers, values.device(args.device))
        if args.dry_run:
            return _dry_run(caching)
        return caching.run()


def _dry_run(caching: DinoCaching) -> int:
    """Print what would be cached and how large it is."""
    for line in run.summary_lines([group.tally for group in caching.groups]):
        print(line)
    sizes = caching.sizes()
    print(f"expected size of the DINO features: {run.size_text(sum(sizes.values()))}")
    run.check_disk_space(sizes, ignore=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
