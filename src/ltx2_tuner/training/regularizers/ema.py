"""Shadows of the trained parameters: an average over the optimizer steps, put in place for a teacher pass."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

COUNTER = "__self_flow_step_counter__"
_PREFIX = "shadow::"


class Shadows:
    """Moving averages of the parameters of a network.

    Args:
        block: only parameters of this transformer block; None means all.
        interval: optimizer steps between updates.
        on_host: keep them in host memory.

    Raises:
        UserError: the network has no parameter in the block.
    """

    def __init__(self, network: nn.Module, block: int | None, momentum: float, interval: int, on_host: bool) -> None:
        self.parameters = {
            name: parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and (block is None or f"transformer_blocks_{block}_" in name)
        }
        if not self.parameters:
            raise UserError(
                f"--self_flow_args teacher_mode=partial_ema: no adapter is in the teacher block {block}; "
                "choose another teacher_block_idx, or teacher_mode=ema"
            )
        self.momentum, self.interval = momentum, interval
        self.steps = 0
        device = "cpu" if on_host else None
        self.values = {name: p.detach().to(device, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimizer step, and follow the parameters on every `interval`-th."""
        self.steps += 1
        if self.steps % self.interval:
            return
        shadows = list(self.values.values())
        current = _moved([parameter.detach() for parameter in self.parameters.values()], shadows[0].device)
        torch._foreach_lerp_(shadows, current, 1 - self.momentum)

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within the block the network holds the shadows; its own values come back even after an exception.

        The parameters change places with the shadows: their values stay where they are, and nothing is copied.
        """
        parameters = list(self.parameters.values())
        before = [parameter.data for parameter in parameters]
        shadows = _moved(list(self.values.values()), before[0].device)
        try:
            for parameter, shadow in zip(parameters, shadows):
                parameter.data = shadow
            yield
        finally:
            for parameter, own in zip(parameters, before):
                parameter.data = own

    def state(self) -> dict[str, Tensor]:
        """Shadows and the step count, for a saved state."""
        shadows = {f"{_PREFIX}{name}": value for name, value in self.values.items()}
        return {**shadows, COUNTER: torch.tensor([self.steps], dtype=torch.int64)}

    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take up saved shadows.

        Raises:
            UserError: they are of other parameters.
        """
        found = {name.removeprefix(_PREFIX): value for name, value in tensors.items() if name.startswith(_PREFIX)}
        shapes = {name: value.shape for name, value in self.values.items()}
        if {name: value.shape for name, value in found.items()} != shapes or COUNTER not in tensors:
            raise UserError(
                f"{source}: its teacher is of other parameters than this run's; use the teacher_mode and "
                "teacher_block_idx that the state was saved with"
            )
        for name, value in self.values.items():
            value.copy_(found[name])
        self.steps = int(tensors[COUNTER])


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device, with one copy for all of them; on it already, they are returned as they are."""
    if tensors[0].device == device:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor).to(tensor.dtype) for piece, tensor in zip(pieces, tensors)]
