"""Random caches that fit a checkpoint and carry its fingerprints, for tests and benchmarks: no clip, no encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx2_tuner.caching.text_side_files import PreservationFile
from ltx2_tuner.checkpoint import Checkpoint, component_id
from ltx2_tuner.data import cache_names
from ltx2_tuner.data.cache_files import write_audio, write_latents, write_text
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.text_encoding import PromptEmbedding

FPS = 25.0
_SOUND_BINS = 16


@dataclass(frozen=True)
class Clip:
    """One cached item: latent grid (F, H, W), and steps of sound (None: no sound cache)."""

    grid: tuple[int, int, int] = (3, 2, 2)
    sound: int | None = None


class SyntheticCaches:
    """Writes what the caching scripts would write for clips that never existed.

    Args:
        checkpoint: the file whose sizes and fingerprints the caches get.
        tokens: of a prompt.
        dtype: of latents and text.
    """

    def __init__(self, checkpoint: Path, *, tokens: int = 16, dtype: torch.dtype = torch.float32) -> None:
        file = Checkpoint.open(checkpoint)
        self.model = TransformerConfig.from_dict(file.config["transformer"])
        self.ids = {name: component_id(file, name) for name in ("video_encoder", "audio_encoder", "text")}
        file.close()
        self.tokens, self.dtype = tokens, dtype
        self.generator = torch.Generator().manual_seed(0)

    def write_items(self, folder: Path, clips: Sequence[Clip]) -> None:
        """Latents, sound and text of each clip."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, clip in enumerate(clips):
            frames, height, width = clip.grid
            pixels, size = (frames - 1) * 8 + 1, (width * 32, height * 32)
            stem = f"{folder.name}{index}"
            path = folder / cache_names.latent_name(cache_names.video_key(stem, 0, pixels), *size)
            facts = {"frame_count": pixels, "target_fps": FPS, "width": size[0], "height": size[1]}
            latents = self._random(self.model.in_channels, *clip.grid)
            write_latents(path, latents, {**facts, "component_id": self.ids["video_encoder"]})
            if clip.sound is not None:
                sound = self._random(self.model.audio_in_channels // _SOUND_BINS, clip.sound, _SOUND_BINS)
                write_audio(cache_names.audio_path(path), sound, {"component_id": self.ids["audio_encoder"]})
            text = self._embedding()
            metadata = {"component_id": self.ids["text"], "ltx_mode": "av", "caption1": f"clip {index}"}
            write_text(folder / cache_names.text_name(stem), text.video, text.audio, text.mask, metadata)

    def write_prompts(self, folder: Path, class_prompt: str) -> None:
        """The preservation prompts: the empty one and that of a class."""
        file = PreservationFile(folder / cache_names.PRESERVATION_NAME, True, class_prompt)
        file.save({text: self._embedding() for text in file.texts}, "av")

    def _embedding(self) -> PromptEmbedding:
        video, audio = (self._random(self.tokens, self.model.context_width(name)) for name in ("video", "audio"))
        return PromptEmbedding(video, audio, torch.ones(self.tokens, dtype=torch.int64))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)
