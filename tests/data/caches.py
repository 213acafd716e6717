"""Small caches on disk, written through the public functions, for tests of the training side."""

from __future__ import annotations

from pathlib import Path

import torch

from ltx2_tuner.data import cache_files, cache_names
from ltx2_tuner.data.config import Dataset, DatasetConfig, load_dataset_config

CHANNELS = 4


def filled(*shape: int, value: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


def write_video_item(
    folder: Path,
    stem: str,
    *,
    start: int = 0,
    frames: int = 17,
    size: tuple[int, int] = (96, 64),
    audio_steps: int | None = None,
    text: bool = True,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A latent of a video item, its text and, with `audio_steps`, its sound. Returns the latent's path."""
    width, height = size
    path = folder / cache_names.latent_name(cache_names.video_key(stem, start, frames), width, height)
    latents = filled(CHANNELS, (frames - 1) // 8 + 1, height // 32, width // 32)
    cache_files.write_latents(path, latents, {"frame_count": str(frames), **(metadata or {})})
    if audio_steps is not None:
        cache_files.write_audio(cache_names.audio_path(path), filled(8, audio_steps, 16, dtype=torch.float16), {})
    if text:
        write_text_item(folder, stem)
    return path


def write_text_item(folder: Path, stem: str, *, audio: bool = True, **metadata: str) -> Path:
    path = folder / cache_names.text_name(stem)
    sound = filled(5, 3) if audio else None
    mask = torch.ones(5, dtype=torch.int64)
    cache_files.write_text(path, filled(5, 6), sound, mask, {"caption1": f"about {stem}", **metadata})
    return path


def write_audio_item(folder: Path, stem: str, steps: int, *, frames: int = 17, text: bool = True) -> Path:
    """A sound item: placeholder latent with virtual geometry, sound latent, text."""
    path = folder / cache_names.latent_name(stem, 960, 544)
    virtual = ((frames - 1) // 8 + 1, 2, 2)
    cache_files.write_latents(path, torch.zeros(CHANNELS, 1, 1, 1), {"frame_count": str(frames)}, virtual)
    cache_files.write_audio(cache_names.audio_path(path), filled(8, steps, 16, dtype=torch.float16), {})
    if text:
        write_text_item(folder, stem)
    return path


def config_for(tmp_path: Path, body: str, mode: str = "video", **options: object) -> DatasetConfig:
    """The configuration of a TOML text, read for training."""
    path = tmp_path / "dataset.toml"
    path.write_text(body, encoding="utf-8")
    return load_dataset_config(path, mode, purpose="training", **options)


def video_dataset(tmp_path: Path, mode: str = "video", extra: str = "") -> Dataset:
    """A video dataset whose cache is `tmp_path/cache`."""
    return video_config(tmp_path, mode, extra).datasets[0]


def video_config(tmp_path: Path, mode: str = "video", extra: str = "") -> DatasetConfig:
    (tmp_path / "videos").mkdir(exist_ok=True)
    body = f"[[datasets]]\nvideo_directory = '{tmp_path}/videos'\ncache_directory = '{tmp_path}/cache'\n{extra}\n"
    return config_for(tmp_path, body, mode)
