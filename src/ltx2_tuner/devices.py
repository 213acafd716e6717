"""Which device is meant."""

from __future__ import annotations

import torch


def exact(device: str | torch.device) -> torch.device:
    """With the number of the GPU: "cuda" alone is another one in a thread, and torch does not take it everywhere."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
