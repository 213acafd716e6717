"""What a slider learns from pairs of prompts: zero latents, and the texts that span the direction.

Legend: C channels, F/H/W latent frames, height, width, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx2_tuner.data.batches import EpochLoader
from ltx2_tuner.data.inventory import CachedItem, Inventory
from ltx2_tuner.training.random import derive_generator
from ltx2_tuner.training.sliders.config import SliderTarget

STEPS_PER_EPOCH = 100


@dataclass(frozen=True)
class Geometry:
    """The synthetic latent: channels, latent frames, height and width in latent cells."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.channels, self.frames, self.height, self.width


@dataclass(frozen=True)
class TargetTexts:
    """Embeddings (S, D) of one target's three prompts."""

    positive: torch.Tensor
    negative: torch.Tensor
    target_class: torch.Tensor


class TextTargets:
    """Stands where a run's training data does: every batch is one target, drawn uniformly.

    An epoch has no natural length; it is `STEPS_PER_EPOCH` optimizer steps.

    Args:
        batches_per_step: micro-batches of an optimizer step over all processes.
    """

    def __init__(
        self,
        targets: Sequence[SliderTarget],
        texts: Sequence[TargetTexts],
        geometry: Geometry,
        *,
        fps: float,
        guidance: float,
        seed: int,
        batches_per_step: int = 1,
    ) -> None:
        self.inventories: list[Inventory] = []
        self._targets, self._texts = list(targets), list(texts)
        self._geometry, self._fps, self._guidance, self._seed = geometry, fps, guidance, seed
        self._count = STEPS_PER_EPOCH * batches_per_step

    def __len__(self) -> int:
        return self._count

    @property
    def items(self) -> list[CachedItem]:
        """One stand-in for every target; it has no files."""
        nowhere, (_, frames, height, width) = Path(), self._geometry.shape
        size = (width * 32, height * 32)
        shared = dict.fromkeys(("audio_path", "dino_path", "reference_path", "reference_audio_path", "audio_steps"))
        return [
            CachedItem(
                key=self._name(number),
                stem=self._name(number),
                latent_path=nowhere,
                text_path=nowhere,
                frames=(frames - 1) * 8 + 1,
                size=size,
                latent_shape=self._geometry.shape,
                bucket_key=size,
                **shared,
            )
            for number in range(len(self._targets))
        ]

    def _name(self, number: int) -> str:
        return f"target {number} ({self._targets[number].positive[:30]})"

    def order(self, epoch: int) -> list[int]:
        return list(range(self._count))

    def target_of(self, epoch: int, number: int) -> int:
        """Which target a batch trains: a draw from the run's seed and the batch's place in it."""
        generator = derive_generator(self._seed, "cond", 0, max(epoch - 1, 0) * self._count + number)
        return int(torch.randint(len(self._targets), (1,), generator=generator))

    def batch_items(self, epoch: int, number: int) -> list[CachedItem]:
        return [self.items[self.target_of(epoch, number)]]

    def __getitem__(self, position: tuple[int, int]) -> dict:
        """A batch of one zero latent, the class prompt's text, and the two prompts that span the direction."""
        chosen = self.target_of(*position)
        texts = self._texts[chosen]
        return {
            "latents": {
                "latents": torch.zeros(1, *self._geometry.shape),
                "fps": torch.tensor([self._fps]),
            },
            "conditions": {
                "video_prompt_embeds": texts.target_class[None],
                "prompt_attention_mask": torch.ones(1, len(texts.target_class), dtype=torch.int64),
            },
            "positive": texts.positive[None],
            "negative": texts.negative[None],
            "guidance": self._guidance,
            "video_loss_weight": self._targets[chosen].weight,
            "timesteps": None,
            "item_keys": [self._name(chosen)],
        }

    def loader(self, *, rank: int = 0, world_size: int = 1, **_: object) -> EpochLoader:
        """Batches of one rank; made in this process, for there is nothing to read."""
        return EpochLoader(self, rank, world_size)
