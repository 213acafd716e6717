"""What the optimizer steps."""

from __future__ import annotations

import torch
from torch import nn


def trained_parameters(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], list[str]]:
    """Every parameter that the optimizer steps, with its name in the network."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs = [(parameter, name) for name, parameter in network.named_parameters() if id(parameter) in stepped]
    return [parameter for parameter, _ in pairs], [name for _, name in pairs]
