"""A trainer whose micro-batches are two opposite passes of one network."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import Modality
from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.modes import Prepared
from ltx2_tuner.training.objective import LossTerms, task_loss
from ltx2_tuner.training.run import Run


class SliderTrainer(Trainer):
    """Steps once on the sum of both passes' gradients. multipliers: strengths the previews are made at.

    Raises:
        UserError: the network's strength cannot be set.
    """

    def __init__(self, run: Run, multipliers: Sequence[float]) -> None:
        super().__init__(run)
        self._multipliers = tuple(multipliers)
        if not callable(getattr(run.network, "set_multiplier", None)):
            raise UserError(
                "sliders train at multipliers +1 and -1, which this --network_module cannot set; use networks.lora_ltx2"
            )

    def _learn(self, batch: dict, draws: Draws) -> tuple[Prepared, LossTerms]:
        """Forward and backward at +1 and at -1; the strength is +1 again afterwards, whatever happens."""
        run, losses = self.run, []
        try:
            for multiplier, prepared in run.mode.passes(batch, draws, self._plain):
                run.network.set_multiplier(multiplier)
                with run.autocast():
                    video, _ = prepared.run(run.model)
                terms = task_loss(prepared, video, None, run.loss)
                self._backward(terms.total)
                losses.append(terms.video.mean.detach())
        finally:
            run.network.set_multiplier(1.0)
        return prepared, LossTerms(torch.stack(losses).mean(), None, None, 0.0)

    @torch.no_grad()
    def _plain(self, modality: Modality) -> torch.Tensor:
        """Velocities (B, T, C) of the model without the network."""
        self.run.network.set_multiplier(0.0)
        with self.run.autocast():
            return self.run.model(modality, None)[0]

    def _sample(self, epoch: int | None) -> None:
        """Every prompt at every strength; the files say which."""
        if self.run.sampler is None:
            return
        with self._evaluation(), torch.no_grad(), contextlib.ExitStack() as stack:
            stack.callback(self.run.network.set_multiplier, 1.0)
            for multiplier in self._multipliers:
                self.run.network.set_multiplier(multiplier)
                self._make_samples(epoch, f"_mult{multiplier:+.1f}")
