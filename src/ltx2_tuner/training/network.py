"""What the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def trained_parameters(
    network: nn.Module, optimizer: torch.optim.Optimizer, others: Mapping[str, nn.Module] | None = None
) -> tuple[list[nn.Parameter], list[str]]:
    """Every parameter that the optimizer steps, with its name in the network, or in one of the `others`."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = list(network.named_parameters())
    for prefix, module in (others or {}).items():
        named += module.named_parameters(prefix)
    pairs = [(parameter, name) for name, parameter in named if id(parameter) in stepped]
    return [parameter for parameter, _ in pairs], [name for _, name in pairs]
