"""The validation loss: the same noise and noise level for an item at every validation, so that the curve compares."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import distributed, nn

from ltx2_tuner.training.draws import ValidationDraws
from ltx2_tuner.training.modes import Mode
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from ltx2_tuner.training.sigmas import SigmaSampler

logger = logging.getLogger(__name__)


@dataclass
class Validator:
    """Measures squared error over the validation items of this process, with the base loss weights.

    batches: iterable more than once, in a fixed order, one item each.
    """

    model: nn.Module
    mode: Mode
    batches: Iterable[dict]
    sampler: SigmaSampler
    seed: int
    device: torch.device

    def measure(self) -> dict[str, float]:
        """`val_loss`, and `/video` and `/audio` where they exist. Call without gradients, in evaluation mode."""
        sums: dict[str, list[torch.Tensor]] = {"val_loss": [], "val_loss/video": [], "val_loss/audio": []}
        for batch in self.batches:
            draws = ValidationDraws(batch["item_keys"][0], self.seed, self.sampler, self.device)
            prepared = self.mode.prepare(batch, draws)
            video, audio = prepared.run(self.model)
            terms = task_loss(prepared, video, audio, LossOptions())
            sums["val_loss"].append(terms.total)
            if terms.video is not None:
                sums["val_loss/video"].append(terms.video.mean)
            if terms.audio is not None and prepared.has_audio:
                sums["val_loss/audio"].append(terms.audio.mean)
        return self._average(sums)

    def _average(self, sums: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        counts = torch.zeros(3, len(sums), dtype=torch.float64, device=self.device)  # sum, finite items, other items
        for column, values in enumerate(sums.values()):
            for value in values:
                finite = torch.isfinite(value)
                counts[0, column] += torch.where(finite, value.double(), 0.0)
                counts[1, column] += finite
                counts[2, column] += ~finite
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        totals, finite, other = counts.tolist()
        if other[0]:
            logger.warning("%d validation items gave a loss that is not finite and were left out", int(other[0]))
        return {name: total / count for name, total, count in zip(sums, totals, finite) if count}
