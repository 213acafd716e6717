"""Names of cache files, both ways. Parsing goes from the right, so that stems may hold anything a file name may."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LATENT_SUFFIX = "_ltx2.safetensors"
AUDIO_SUFFIX = "_ltx2_audio.safetensors"
DINO_SUFFIX = "_ltx2_dino.safetensors"
TEXT_SUFFIX = "_ltx2_te.safetensors"

# Side files that lie in the cache directory of the first dataset.
SAMPLE_PROMPTS_NAME = "ltx2_sample_prompts_cache.pt"
SAMPLE_LATENTS_NAME = "ltx2_sample_latents_cache.pt"
PRESERVATION_NAME = "ltx2_preservation_cache.pt"
SILENCE_NAME = "ltx2_silence_latent.safetensors"
REPORT_NAME = "ltx2_cache_report.json"

_VIDEO = re.compile(
    r"(?P<stem>.+)_(?P<start>\d{5,})-(?P<frames>\d{3,})_(?P<width>\d{4,})x(?P<height>\d{4,})_ltx2\.safetensors",
    re.DOTALL,
)
_OTHER = re.compile(r"(?P<stem>.+)_(?P<width>\d{4,})x(?P<height>\d{4,})_ltx2\.safetensors", re.DOTALL)


@dataclass(frozen=True)
class CacheName:
    """The parts of a latent file's name. `start` and `frames` are None for image and audio items."""

    stem: str
    width: int
    height: int
    start: int | None = None
    frames: int | None = None

    @property
    def key(self) -> str:
        """The item key: the stem, and for video items the window."""
        return self.stem if self.start is None else video_key(self.stem, self.start, self.frames)


def video_key(stem: str, start: int, frames: int) -> str:
    """Item key of `frames` output frames from `start` on."""
    return f"{stem}_{start:05d}-{frames:03d}"


def latent_name(key: str, width: int, height: int) -> str:
    """File name of an item's latent; for what width and height mean see `data.items`."""
    return f"{key}_{width:04d}x{height:04d}{LATENT_SUFFIX}"


def text_name(stem: str) -> str:
    """File name of the text embeddings, one per source file."""
    return f"{stem}{TEXT_SUFFIX}"


def audio_path(latent: Path) -> Path:
    """The sound latent beside a latent file."""
    return latent.with_name(latent.name.removesuffix(LATENT_SUFFIX) + AUDIO_SUFFIX)


def dino_path(latent: Path) -> Path:
    """The DINO features beside a latent file."""
    return latent.with_name(latent.name.removesuffix(LATENT_SUFFIX) + DINO_SUFFIX)


def simple_audio_path(latent: Path, stem: str) -> Path:
    """Where the simplified layout of the user guide keeps a sound latent (read only, never written)."""
    return latent.with_name(f"{stem}{AUDIO_SUFFIX}")


def parse_latent_name(name: str, *, video: bool) -> CacheName | None:
    """The parts of a latent's file name, or None when it is not one (of a video dataset, if `video`)."""
    match = (_VIDEO if video else _OTHER).fullmatch(name)
    if match is None:
        return None
    parts = match.groupdict()
    window = {key: int(parts[key]) for key in ("start", "frames") if key in parts}
    return CacheName(parts["stem"], int(parts["width"]), int(parts["height"]), **window)


def parse_text_name(name: str) -> str | None:
    """The stem of a text file's name, or None when it is not one."""
    stem = name.removesuffix(TEXT_SUFFIX)
    return stem if stem and stem != name else None
