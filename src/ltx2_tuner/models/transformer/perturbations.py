"""Which attentions a guidance pass leaves out, per sample and per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("skip_video_self", "skip_audio_self", "skip_a2v", "skip_v2a")


class Skip(NamedTuple):
    """One attention of one block: left out for every sample (`keep` is None), or where `keep` (B, 1, 1) is 0."""

    keep: Tensor | None = None


class BlockPerturbations(NamedTuple):
    """The perturbations of one block; None means that the attention runs as usual."""

    skip_video_self: Skip | None = None
    skip_audio_self: Skip | None = None
    skip_a2v: Skip | None = None
    skip_v2a: Skip | None = None


@dataclass(frozen=True)
class SamplePerturbations:
    """Block indices, for one sample, in which an attention is left out; "all" means every block.

    Skipping self-attention (`skip_video_self`, `skip_audio_self`) replaces its result by the values it would have
    averaged; skipping a cross-modal attention (`skip_a2v`: video reading audio, `skip_v2a`) drops its residual.
    """

    skip_video_self: frozenset[int] | str = frozenset()
    skip_audio_self: frozenset[int] | str = frozenset()
    skip_a2v: frozenset[int] | str = frozenset()
    skip_v2a: frozenset[int] | str = frozenset()

    def skips(self, kind: str, block: int) -> bool:
        """Whether the attention `kind` (one of KINDS) is left out in this block."""
        blocks = getattr(self, kind)
        return blocks == "all" or block in blocks


@dataclass(frozen=True)
class Perturbations:
    """One entry per sample of the batch."""

    samples: tuple[SamplePerturbations, ...]

    @classmethod
    def uniform(
        cls,
        batch: int,
        *,
        skip_video_self: Sequence[int] | str = (),
        skip_audio_self: Sequence[int] | str = (),
        skip_a2v: Sequence[int] | str = (),
        skip_v2a: Sequence[int] | str = (),
    ) -> Perturbations:
        """The same perturbation for all samples; each argument lists blocks, or is "all"."""
        wanted = (skip_video_self, skip_audio_self, skip_a2v, skip_v2a)
        sample = SamplePerturbations(*(blocks if blocks == "all" else frozenset(blocks) for blocks in wanted))
        return cls((sample,) * batch)

    def for_block(self, index: int, dtype: torch.dtype, device: torch.device) -> BlockPerturbations | None:
        """What the block `index` has to leave out, or None for nothing."""
        skips = {kind: self._skip(kind, index, dtype, device) for kind in KINDS}
        return BlockPerturbations(**skips) if any(skip is not None for skip in skips.values()) else None

    def _skip(self, kind: str, index: int, dtype: torch.dtype, device: torch.device) -> Skip | None:
        skipped = [sample.skips(kind, index) for sample in self.samples]
        if not any(skipped):
            return None
        if all(skipped):
            return Skip()
        keep = torch.tensor([0.0 if skip else 1.0 for skip in skipped], dtype=dtype, device=device)
        return Skip(keep[:, None, None])
