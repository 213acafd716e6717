"""Tiny slider runs."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ltx2_tuner.cli import ltx2_train_slider as script
from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.text_encoding import write_tiny_gemma
from ltx2_tuner.training.build import build
from ltx2_tuner.training.sliders import SliderTrainer
from ltx2_tuner.training.sources import Processes
from tests.training.tiny import Clip, Recorder, write_caches

FLAGS = (
    *("--output_name", "tiny", "--learning_rate", "1e-3", "--network_dim", "4", "--seed", "7", "--device", "cpu"),
    *("--dit_dtype", "float32", "--mixed_precision", "no", "--max_data_loader_n_workers", "0"),
    *("--max_train_steps", "4", "--latent_height", "64", "--latent_width", "64"),
)


def text_slider(folder: Path, checkpoint: Path, *more: object, weight: float = 1.0, ltx2_mode: str = "video"):
    """Command line and slider file of a text slider with one target."""
    if not (folder / "gemma").is_dir():
        write_tiny_gemma(folder / "gemma", seed=0)
    slider = folder / "slider.toml"
    slider.write_text(
        f'mode = "text"\n[[targets]]\npositive = "a red fox, sharp"\nnegative = "fog"\nweight = {weight}\n',
        encoding="utf-8",
    )
    base = ("--ltx2_checkpoint", checkpoint, "--gemma_root", folder / "gemma", "--slider_config", slider)
    base += ("--output_dir", folder / "output", "--ltx2_mode", ltx2_mode, *FLAGS)
    return [str(token) for token in (*base, *more)], slider


def write_pairs(folder: Path, checkpoint: Path, *more: object):
    """Command line and slider file of three pairs of clips."""
    for name in ("positive", "negative"):
        write_caches(folder / name, checkpoint, [Clip()] * 3)
    for path in sorted((folder / "negative").iterdir()):  # names as the positives', other content
        path.rename(path.with_name(path.name.replace("negative", "positive")))
    for path in (folder / "negative").glob("*_ltx2.safetensors"):
        _shift(path)
    slider = folder / "slider.toml"
    slider.write_text('mode = "reference"\npos_cache_dir = "positive"\nneg_cache_dir = "negative"\n', encoding="utf-8")
    base = ("--ltx2_checkpoint", checkpoint, "--slider_config", slider, "--output_dir", folder / "output", *FLAGS)
    return [str(token) for token in (*base, *more)], slider


def _shift(path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: tensor + 1.5 for name, tensor in tensors.items()}, path, metadata)


def make_slider_trainer(made: tuple[list[str], Path], recorder: Recorder | None = None) -> SliderTrainer:
    """The trainer of a command line."""
    parser = script.build_parser()
    args = parse_with_config(parser, script.join_ranges(made[0]))
    slider = script._slider(args)
    config = training_config(args, "no", slider)
    processes = Processes(torch.device("cpu"))
    config.save.output_dir.mkdir(parents=True, exist_ok=True)
    sources, _ = script._open_sources(args, config, slider, processes)
    make = functools.partial(SliderTrainer, multipliers=slider.multipliers)
    return build(config, processes, sources, recorder or Recorder(), None, make)
