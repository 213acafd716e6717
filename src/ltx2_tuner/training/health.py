"""Whether an adapter that is about to be saved is one that somebody would want to use.

An adapter can break without its loss saying so at once: it then makes black or noisy clips, which a run without
samples shows to nobody. So each save looks at the values and runs the model once on the batch trained on last.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from ltx2_tuner.training.modes.base import Prepared

logger = logging.getLogger(__name__)

GROWTH = 10.0  # of the norm between two saves; training at a sane rate stays far below
WORSE = 2.0  # times the plain model's loss on a batch that was trained on


class AdapterHealth:
    """Remembers the last save's norm to compare the next one with."""

    def __init__(self) -> None:
        self._norm: float | None = None

    def check(self, network: nn.Module, model: nn.Module, prepared: Prepared | None) -> None:
        """Warn about values and predictions that no good adapter has.

        Args:
            prepared: a forward to try; None skips that. Gradients are off and the modules in eval mode.
        """
        self._check_norm(network)
        if prepared is None:
            return
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            error = _error(prepared, model)
            with _without(network) as switched_off:
                plain = _error(prepared, model) if switched_off else math.nan
        if not math.isfinite(error):
            blame = "the plain model does not" if math.isfinite(plain) else "look at the checkpoint and the caches"
            logger.warning("with the adapter the model predicts values that are no numbers; %s", blame)
        elif error > WORSE * plain:
            logger.warning(
                "on the batch trained on last, the adapter's loss is %.3g and the plain model's %.3g: it does harm; "
                "a lower --learning_rate is safer",
                error,
                plain,
            )

    def _check_norm(self, network: nn.Module) -> None:
        values = [parameter.detach().float() for parameter in network.parameters()]
        norm = float(torch.stack([value.norm() for value in values]).norm()) if values else 0.0
        ups = [value for name, value in network.named_parameters() if "lora_up" in name]
        if ups and not any(bool(up.any()) for up in ups):
            logger.warning("the adapter is as it was at the start: nothing has been learned yet")
        if self._norm and norm > GROWTH * self._norm:
            logger.warning(
                "the adapter's norm grew from %.3g to %.3g since the last save; a lower --learning_rate is safer",
                self._norm,
                norm,
            )
        self._norm = norm


def _error(prepared: Prepared, model: nn.Module) -> float:
    """Mean squared error over the tokens that count, pictures and sound added up."""
    error = 0.0
    for predicted, task in zip(prepared.run(model), (prepared.video_task, prepared.audio_task)):
        if predicted is not None and bool(task.mask.any()):
            mask = task.mask.to(predicted.device)
            error += float((predicted[mask].float() - task.target.to(predicted.device)[mask].float()).square().mean())
    return error


@contextlib.contextmanager
def _without(network: nn.Module):
    """The plain model within the block; yields False for networks that cannot be switched off."""
    disabled: Callable | None = getattr(network, "disabled", None)
    if disabled is None:
        yield False
        return
    with disabled():
        yield True
