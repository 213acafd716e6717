"""Extra passes of the model: without the network, or with it as it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.training.modes import Prepared

Predictions = tuple[torch.Tensor | None, torch.Tensor | None]


class _Reached(Exception):
    """Ends a pass at the block whose output is wanted."""


@dataclass(frozen=True)
class Passes:
    """The model and its network.

    Extra passes run before the main forward or after its backward, never in between: blocks that are recomputed in the
    backward pass use the adapters' working copies of the latest pass.
    """

    model: LTXTransformer
    network: nn.Module
    autocast: Callable[[], contextlib.AbstractContextManager]

    def plain(self, prepared: Prepared) -> Predictions:
        """Velocities of the target tokens as the plain model predicts them: network off, evaluation mode."""
        with torch.no_grad(), self.autocast(), evaluating(self.network), switched_off(self.network):
            return prepared.run(self.model)

    def trained(self, prepared: Prepared) -> Predictions:
        """The same from the model as it is being trained, with gradients."""
        with self.autocast():
            return prepared.run(self.model)

    def features(self, video: Modality, block: int) -> torch.Tensor:
        """Hidden states (B, T, D) after a block, in evaluation mode; later blocks do not run."""
        found: list[torch.Tensor] = []

        def stop(index: int, hidden: torch.Tensor, _: torch.Tensor | None) -> None:
            if index == block:
                found.append(hidden)
                raise _Reached

        with (
            contextlib.suppress(_Reached),
            torch.no_grad(),
            self.autocast(),
            evaluating(self.network),
            observing(self.model, stop),
        ):
            self.model(video, None)
        return found[0]


@contextlib.contextmanager
def observing(model: LTXTransformer, observer: Callable[..., None]) -> Iterator[None]:
    """Within the block, the observer sees the hidden states after every transformer block."""
    before = model.block_outputs
    model.block_outputs = observer
    try:
        yield
    finally:
        model.block_outputs = before


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """No dropout of the network within the block."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


@contextlib.contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """The plain model within the block, whatever the network module; on again even after an exception."""
    if hasattr(network, "disabled"):
        with network.disabled():
            yield
        return
    before = network.multiplier
    network.set_multiplier(0.0)
    try:
        yield
    finally:
        network.set_multiplier(before)
