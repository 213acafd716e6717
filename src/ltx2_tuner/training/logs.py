"""TensorBoard and wandb: one place that numbers are handed to."""

from __future__ import annotations

import logging
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ltx2_tuner.errors import UserError
from ltx2_tuner.media.audio import read_audio
from ltx2_tuner.media.images import read_image
from ltx2_tuner.media.video import count_frames, read_frames
from ltx2_tuner.training.options import LogOptions
from ltx2_tuner.training.run_log import RunLog

logger = logging.getLogger(__name__)


class Trackers:
    """Writes scalars and histograms to every tracker of the options; does nothing in processes but the first.

    config: flags to store with the run, without keys and paths. wandb_key: logs in for this process only. run_log: the
    run's own file, which gets every scalar whatever the trackers.

    Raises:
        UserError: a tracker's package is missing.
    """

    def __init__(
        self,
        options: LogOptions,
        *,
        is_main: bool,
        config: Mapping[str, object] | None = None,
        wandb_key: str | None = None,
        run_log: RunLog | None = None,
    ) -> None:
        self._run_log = run_log
        self._board = self._wandb = None
        wanted = options.trackers if is_main else ()
        if "tensorboard" in wanted:
            self._board = _open_board(options)
            if config:
                rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
                self._board.add_text("config", f"| flag | value |\n|---|---|\n{rows}")
        if "wandb" in wanted:
            self._wandb = _open_wandb(options, config, wandb_key)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars under their names."""
        if self._run_log is not None:
            self._run_log.log(metrics, step)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Write a distribution."""
        import torch

        if self._board is not None:
            self._board.add_histogram(name, torch.tensor(values), step)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Histogram(list(values))}, step=step)

    def sample(self, index: int, paths: Sequence[Path], step: int, label: str = "") -> None:
        """Show the files of a sample: pictures and clips (TensorBoard: their middle frame) and sound."""
        name = f"sample_{index}{label}"
        if self._board is not None:
            _show_on_board(self._board, name, paths, step)
        if self._wandb is not None:
            import wandb

            kinds = {".mp4": wandb.Video, ".png": wandb.Image, ".wav": wandb.Audio}
            for path in paths:
                tag = name + ("_audio" if path.suffix == ".wav" else "")
                self._wandb.log({tag: kinds[path.suffix](os.fspath(path))}, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _show_on_board(board, name: str, paths: Sequence[Path], step: int) -> None:
    """The middle frame of the picture and the sound; a merged clip repeats both and is left out."""
    for path in paths:
        if path.suffix == ".wav":
            samples, rate = read_audio(path)
            board.add_audio(name, samples.mean(axis=0, keepdims=True), step, sample_rate=rate)
        elif path.suffix == ".png":
            board.add_image(name, read_image(path), step, dataformats="HWC")
        elif not path.stem.endswith("_av"):
            middle = count_frames(path).frames // 2
            board.add_image(name, read_frames(path, [middle])[0], step, dataformats="HWC")


def _open_board(options: LogOptions):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--logging_dir needs TensorBoard: pip install tensorboard") from error
    folder = options.directory / f"{options.prefix}{time.strftime('%Y%m%d%H%M%S')}" / options.name
    logger.info("TensorBoard logs go to %s", folder)
    return SummaryWriter(str(folder))


def _open_wandb(options: LogOptions, config: Mapping[str, object] | None, key: str | None):
    try:
        import wandb
    except ImportError as error:
        raise UserError("--log_with wandb needs its package: pip install wandb") from error
    if key:
        wandb.login(key=key)
    settings = {}
    if options.tracker_config is not None:
        settings = tomllib.loads(options.tracker_config.read_text(encoding="utf-8")).get("wandb", {})
    folder = None if options.directory is None else os.fspath(options.directory)
    return wandb.init(
        project=options.name, name=options.wandb_run_name, dir=folder, config=dict(config or {}), **settings
    )
