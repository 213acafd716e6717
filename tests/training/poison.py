"""Batches that are not finite, at chosen places of a run."""

from __future__ import annotations

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.loop import Trainer
from tests.training.tiny import Recorder, Workspace, make_trainer


class Poisoned:
    """Batches whose latents are NaN at the given places of the run; one cannot be read."""

    def __init__(self, data, places, unreadable: int | None = None) -> None:
        self.data, self.places, self.unreadable, self.count = data, places, unreadable, 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        self.data.set_epoch(epoch, skip)

    def __iter__(self):
        for batch in self.data:
            if self.count == self.unreadable:
                raise UserError("a damaged cache")
            if self.places is None or self.count in self.places:
                batch["latents"]["latents"] = torch.full_like(batch["latents"]["latents"], float("nan"))
            self.count += 1
            yield batch


def poisoned_trainer(space: Workspace, places: set[int] | None, *flags: object) -> tuple[Trainer, Recorder]:
    """Of a workspace's run and what it logs. places: of micro-batches since the start; None for all."""
    recorder = Recorder()
    trainer = make_trainer(space.arguments(*flags), recorder)
    trainer.run.data = Poisoned(trainer.run.data, places)
    return trainer, recorder
