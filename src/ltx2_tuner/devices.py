"""Which device is meant, and how its memory is given out."""

from __future__ import annotations

import os

import torch

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 and later, and before


def keep_memory_in_one_piece() -> None:
    """Have torch give out the device's memory from segments that grow, which leaves fewer gaps that nothing fits into.

    Call it before anything is on the device. What the user has set stays.
    """
    if not set(_SETTINGS) & os.environ.keys():
        os.environ.update(dict.fromkeys(_SETTINGS, "expandable_segments:True"))


def exact(device: str | torch.device) -> torch.device:
    """With the number of the GPU: "cuda" alone is another one in a thread, and torch does not take it everywhere."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
