"""Keeping the inputs of recomputed blocks in host memory between forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class _Parked:
    """A tensor in host memory; `arrived` is when its copy is complete."""

    host: Tensor
    device: torch.device
    arrived: torch.cuda.Event | None


class ActivationOffload:
    """Makes the context under which a block's inputs are saved (`enable_gradient_checkpointing(saved_inputs=...)`).

    Copies run on their own stream into page-locked memory, beside the compute; what comes back lies on its device.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> AbstractContextManager:
        return saved_tensors_hooks(self._park, self._fetch)

    def _park(self, tensor: Tensor) -> _Parked:
        if self._copies is None or not tensor.is_cuda:
            return _Parked(tensor.detach().to("cpu", copy=True), tensor.device, None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._copies):
            host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        tensor.record_stream(self._copies)
        return _Parked(host, tensor.device, arrived)

    def _fetch(self, parked: _Parked) -> Tensor:
        if parked.arrived is not None:
            torch.cuda.current_stream(parked.device).wait_event(parked.arrived)
        return parked.host.to(parked.device, non_blocking=True)
