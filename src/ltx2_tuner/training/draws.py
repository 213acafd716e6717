"""The random decisions of one micro-batch, behind one interface: training draws, and the fixed ones of validation."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ltx2_tuner.training.random import DrawKey
from ltx2_tuner.training.sigmas import SigmaSampler


class Draws(Protocol):
    """What a mode may ask for. B is the batch size; every answer but `noise` lives on the CPU."""

    def caption_dropout(self, count: int) -> torch.Tensor:
        """(B,) bool: samples whose text is dropped."""

    def first_frame(self, count: int) -> torch.Tensor | None:
        """(B,) bool: samples whose first latent frame stays clean; None where that never happens."""

    def sigma(self, tokens: torch.Tensor, buckets: torch.Tensor | None = None) -> torch.Tensor:
        """(B,) float32 noise levels for samples of `tokens` (B,) tokens."""

    def audio_sigma(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) float32: a second, independent draw."""

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal float32 values on the compute device."""


class TrainingDraws:
    """Draws of one training micro-batch, derived from its key. Features that are off consume nothing."""

    def __init__(
        self,
        key: DrawKey,
        sampler: SigmaSampler,
        device: torch.device | str = "cpu",
        *,
        first_frame_p: float = 0.0,
        caption_dropout_rate: float = 0.0,
    ) -> None:
        self._key = key
        self._sampler = sampler
        self._device = device
        self._first_frame_p = first_frame_p
        self._caption_dropout_rate = caption_dropout_rate
        self._decisions = key.generator("cond")
        self._sigmas = key.generator("sigma")
        self._noise = key.generator("noise", device)

    def caption_dropout(self, count: int) -> torch.Tensor:
        return self._decide(count, self._caption_dropout_rate)

    def first_frame(self, count: int) -> torch.Tensor | None:
        return self._decide(count, self._first_frame_p) if self._first_frame_p > 0 else None

    def _decide(self, count: int, probability: float) -> torch.Tensor:
        if probability <= 0:
            return torch.zeros(count, dtype=torch.bool)
        return torch.rand(count, generator=self._decisions) < probability

    def sigma(self, tokens: torch.Tensor, buckets: torch.Tensor | None = None) -> torch.Tensor:
        return self._sampler.sample(tokens, self._sigmas, buckets)

    def audio_sigma(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._sampler.sample(tokens, self._sigmas)

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._noise, device=self._device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Values in [0, 1) on the CPU, for further decisions."""
        return torch.rand(shape, generator=self._decisions)

    def again(self) -> TrainingDraws:
        """The same draws from their start."""
        return TrainingDraws(
            self._key,
            self._sampler,
            self._device,
            first_frame_p=self._first_frame_p,
            caption_dropout_rate=self._caption_dropout_rate,
        )


@dataclass
class ValidationDraws:
    """Draws of one validation item: the same at every validation, from the item's key and the run's seed.

    All come from one CPU generator in a fixed order (sigma's u, U1, U2, then video noise, audio sigma, audio noise).
    """

    item_key: str
    seed: int
    sampler: SigmaSampler
    device: torch.device | str = "cpu"
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        seed = zlib.crc32(self.item_key.encode("utf-8")) ^ (self.seed % 2**32)
        self._generator = torch.Generator().manual_seed(seed)

    def caption_dropout(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.bool)

    def first_frame(self, count: int) -> None:
        return None

    def sigma(self, tokens: torch.Tensor, buckets: torch.Tensor | None = None) -> torch.Tensor:
        return self.audio_sigma(tokens)

    def audio_sigma(self, tokens: torch.Tensor) -> torch.Tensor:
        stratum = torch.rand(len(tokens), generator=self._generator)
        return self.sampler.sample(tokens, self._generator, stratum)

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)
