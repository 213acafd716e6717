"""Which device is meant, and how tensors get there and back."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(device: str | torch.device) -> torch.device:
    """With the number of the GPU: "cuda" alone is another one in a thread, and torch does not take it everywhere."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`, without waiting for what a GPU is doing: a plain copy to it ends all its work first."""
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        tensor = pinned.to(device, non_blocking=True)
    return tensor.to(device, dtype)


class Arriving:
    """A tensor on its way to the host; what is given to its device meanwhile need not end first."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
