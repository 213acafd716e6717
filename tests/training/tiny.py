"""A tiny checkpoint with matching caches, and training runs on them that record what they log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ltx2_tuner.checkpoint import Checkpoint, component_id, write_tiny_checkpoint
from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.cli.regularizers import blank_prompt, preservation_prompts
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.data.cache_files import write_audio, write_latents, write_text
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.training.build import build
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.sources import Processes, open_sources


@dataclass(frozen=True)
class Clip:
    """One cached item: latent grid (F, H, W), and steps of sound (None: no sound cache)."""

    grid: tuple[int, int, int] = (3, 2, 2)
    sound: int | None = None


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
    checkpoint = Checkpoint.open(path)
    model = TransformerConfig.from_dict(checkpoint.config["transformer"])
    ids = {name: component_id(checkpoint, name) for name in ("video_encoder", "audio_encoder", "text")}
    checkpoint.close()
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for index, clip in enumerate(clips):
        frames, height, width = clip.grid
        pixels = (frames - 1) * 8 + 1
        size = f"{width * 32:04d}x{height * 32:04d}"
        stem = f"{folder.name}{index}"
        item = f"{stem}_00000-{pixels:03d}_{size}_ltx2"
        latents = torch.randn(model.in_channels, frames, height, width, generator=generator)
        facts = {"frame_count": pixels, "target_fps": 25.0, "width": width * 32, "height": height * 32}
        write_latents(folder / f"{item}.safetensors", latents, {**facts, "component_id": ids["video_encoder"]})
        if clip.sound is not None:
            sound = torch.randn(2, clip.sound, 16, generator=generator)
            write_audio(folder / f"{item}_audio.safetensors", sound, {"component_id": ids["audio_encoder"]})
        write_text(
            folder / f"{stem}_ltx2_te.safetensors",
            torch.randn(16, model.context_width("video"), generator=generator),
            torch.randn(16, model.context_width("audio"), generator=generator),
            torch.ones(16, dtype=torch.int64),
            {"component_id": ids["text"], "ltx_mode": "av", "caption1": f"clip {index}"},
        )


@dataclass
class Recorder:
    """Stands for the trackers: keeps every logged number."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append({"step": step, **metrics})

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self.steps.append({"step": step, name: len(values)})

    def sample(self, index: int, paths: Sequence[Path], step: int) -> None:
        self.steps.append({"step": step, f"sample_{index}": len(paths)})

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
