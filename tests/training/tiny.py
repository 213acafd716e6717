"""A tiny checkpoint with matching caches, and training runs on them that record what they log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ltx2_tuner.caching.synthetic import Clip, SyntheticCaches
from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.cli.regularizers import blank_prompt, preservation_prompts
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.training.build import build
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.sources import Processes, open_sources


@dataclass(frozen=True)
class Workspace:
    """Folders of a test: the checkpoint, the dataset file and the output folder."""

    root: Path
    checkpoint: Path
    dataset: Path
    output: Path

    def arguments(self, *more: object) -> list[str]:
        """A command line that trains on the CPU in float32; later arguments win."""
        base = {
            "ltx2_checkpoint": self.checkpoint,
            "dataset_config": self.dataset,
            "output_dir": self.output,
            "output_name": "tiny",
            "learning_rate": 1e-3,
            "network_dim": 4,
            "seed": 7,
            "device": "cpu",
            "dit_dtype": "float32",
            "mixed_precision": "no",
            "max_data_loader_n_workers": 0,
            "max_train_steps": 4,
        }
        return [*(token for key, value in base.items() for token in (f"--{key}", str(value))), *map(str, more)]


def write_checkpoint(path: Path, version: str = "2.3", **sizes) -> Path:
    """A tiny checkpoint; kept when it is there already."""
    if not path.is_file():
        write_tiny_checkpoint(path, version, **sizes)
    return path


def write_workspace(
    root: Path,
    checkpoint: Path,
    clips: Sequence[Clip] = (Clip(),) * 3,
    *,
    batch_size: int = 1,
    validation: Sequence[Clip] = (),
    options: str = "",
) -> Workspace:
    """Write caches for the clips and a dataset file beside them."""
    text = [f"[general]\nresolution = [64, 64]\nbatch_size = {batch_size}\n{options}"]
    for table, entries in (("datasets", clips), ("validation_datasets", validation)):
        if not entries:
            continue
        cache = root / table
        write_caches(cache, checkpoint, entries)
        text.append(
            f"[[{table}]]\nvideo_directory = '{(root / 'videos').as_posix()}'\n"
            f"cache_directory = '{cache.as_posix()}'\ntarget_frames = [17]\n"
        )
    (root / "videos").mkdir(exist_ok=True)
    (root / "data.toml").write_text("\n".join(text), encoding="utf-8")
    return Workspace(root, checkpoint, root / "data.toml", root / "output")


def write_caches(folder: Path, path: Path, clips: Sequence[Clip]) -> None:
    """Random latents, sound and text for each clip, as the caching scripts would name them."""
    SyntheticCaches(path).write_items(folder, clips)


@dataclass
class Recorder:
    """Stands for the trackers: keeps every logged number."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append({"step": step, **metrics})

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self.steps.append({"step": step, name: len(values)})

    def sample(self, index: int, paths: Sequence[Path], step: int, label: str = "") -> None:
        self.steps.append({"step": step, f"sample_{index}{label}": len(paths)})

    def values(self, name: str) -> list[float]:
        """What was logged under a name, in order."""
        return [metrics[name] for metrics in self.steps if name in metrics]


def make_trainer(
    arguments: Sequence[str],
    recorder: Recorder | None = None,
    sampler=None,
    processes: Processes = Processes(torch.device("cpu")),  # noqa: B008 - frozen
) -> Trainer:
    """The trainer of a command line."""
    args = parse_with_config(build_parser(), arguments)
    config = training_config(args, args.mixed_precision or "no")
    config.save.output_dir.mkdir(parents=True, exist_ok=True)
    sources = open_sources(config, processes)
    prompts = preservation_prompts(args, config, sources, processes)
    blank = blank_prompt(args, config, sources, processes)
    return build(config, processes, sources, recorder or Recorder(), sampler, prompts=prompts, blank=blank)


def train(arguments: Sequence[str], sampler=None) -> Recorder:
    """Train and return what was logged."""
    recorder = Recorder()
    make_trainer(arguments, recorder, sampler).train()
    return recorder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
