"""The small networks that regularizers train beside the adapters: made alike in every run, saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.random import derive_seed

logger = logging.getLogger(__name__)


class Projector(nn.Module):
    """Linear, activation, linear; parameters in float32, `net.0`, `net.2`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))

    def forward(self, states: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.net(states.float())


def seeded(make: Callable[[], nn.Module], seed: int, name: str) -> nn.Module:
    """A module with its default initialisation drawn from the run's `init` stream for `name`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", name=name))
        return make()


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, None where there is none or it is damaged (which is told)."""
    if not path.is_file():
        return None
    try:
        with SafetensorsFile(path) as file:
            return {name: file.read(name) for name in file.tensors}
    except UserError as error:
        logger.warning("%s; it is not used", error)
        return None


def load_if_it_fits(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> bool:
    """Load tensors into a module; False, with a warning, when names or shapes differ."""
    mine = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if mine != theirs:
        logger.warning("%s does not fit this run's projector, which starts fresh", source)
        return False
    module.load_state_dict(dict(tensors))
    logger.info("projector loaded from %s", source)
    return True
