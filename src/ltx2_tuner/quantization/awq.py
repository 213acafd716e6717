"""AWQ: input columns that matter are scaled up before they are quantised, and down again in the product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MIN_COLUMN_SCALE = 1e-5


def column_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Factors (in,) of a weight (out, in).

    Args:
        activation: (in,) mean absolute input.
        alpha: 0 (factors of 1) to 1.
    """
    importance = activation.float() * weight.float().abs().amax(0)
    return (importance / importance.mean().clamp(min=1e-12)).pow(alpha).clamp(min=MIN_COLUMN_SCALE)


@contextmanager
def observed_inputs(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Collect the mean absolute input (in,) of each layer that runs inside the block, by its name."""
    means: dict[str, Tensor] = {}

    def observe(name: str):
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            means[name] = inputs[0].detach().float().abs().flatten(0, -2).mean(0)

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            yield means
    finally:
        for handle in handles:
            handle.remove()
