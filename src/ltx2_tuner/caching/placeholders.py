"""Placeholder picture latents of sound items: the virtual geometry that the model is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ltx2_tuner.caching.ledger import Ledger
from ltx2_tuner.caching.run import Tally, read_metadata
from ltx2_tuner.data.buckets import STEP, Size
from ltx2_tuner.data.cache_files import write_latents
from ltx2_tuner.data.extraction import latent_frames, round8
from ltx2_tuner.data.items import Item
from ltx2_tuner.data.metadata import latent_metadata


@dataclass(frozen=True)
class Geometry:
    """How long and how large the picture of a sound item would be.

    fps: frames/s that turn seconds into frames. sequence_resolution: virtual side in pixels; 0 takes
    target_resolution (square), or else the dataset's resolution. channels, dtype: of the placeholder.
    """

    fps: float = 25.0
    sequence_resolution: int = 64
    target_resolution: int | None = None
    channels: int = 128
    dtype: torch.dtype = torch.float16

    def frames(self, seconds: float) -> int:
        """Pixel frames, 8n + 1, of so many seconds of sound."""
        return round8(max(1, round(seconds * self.fps)))

    def cells(self, resolution: Size) -> tuple[int, int]:
        """Virtual (height, width) in latent cells; `resolution` is the dataset's (width, height) in pixels."""
        if self.sequence_resolution:
            width = height = self.sequence_resolution
        elif self.target_resolution:
            width = height = self.target_resolution
        else:
            width, height = resolution
        return max(height // STEP, 1), max(width // STEP, 1)


def write_placeholders(
    items: Iterable[Item],
    geometry: Geometry,
    component_id: str,
    settings: dict[str, object],
    ledger: Ledger,
    tally: Tally,
) -> None:
    """Write the placeholder of every item whose sound latent is there.

    Args:
        component_id: fingerprint of the audio encoder, the only one that such an item depends on.
        settings: what else changes the stored numbers.
    """
    for item in items:
        seconds = float(read_metadata(item.audio_path)["duration_seconds"])
        frames = geometry.frames(seconds)
        virtual = (latent_frames(frames), *geometry.cells(item.bucket))
        preprocess = settings | {"virtual": virtual, "dtype": str(geometry.dtype).removeprefix("torch.")}
        metadata = latent_metadata(item, component_id=component_id, preprocess=preprocess) | {
            "frame_count": str(frames),
            "target_fps": str(geometry.fps),
            "duration_seconds": str(seconds),
        }
        if ledger.keeps(item.latent_path, metadata):
            tally.add("skipped (existing)")
            continue
        write_latents(
            item.latent_path, torch.zeros(geometry.channels, 1, 1, 1, dtype=geometry.dtype), metadata, virtual
        )
        ledger.wrote(item.latent_path)
        tally.add("encoded")
