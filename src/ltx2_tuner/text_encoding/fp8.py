"""A frozen linear layer whose weight stays in fp8 and may stay in host memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fp8Linear(nn.Module):
    """y = x (weight * scale)^T, with the weight widened to the dtype of x for the duration of the call.

    The weight is a plain attribute, so that moving or casting the model leaves it where and what it is.

    Args:
        weight: (out, in) fp8.
        scale: float32, one number or one per row; None when the weight is a plain cast.
        device: where the layer computes.
        offload: keep the weight in host memory (pinned where that works) between calls.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, device: torch.device, offload: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _pinned(weight) if offload and device.type == "cuda" else weight.to(device)
        self.scale = None if scale is None else scale.reshape(-1, 1).to(device)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device, non_blocking=True)
        if self.scale is None:
            weight = weight.to(x.dtype)
        else:
            weight = (weight.float() * self.scale).to(x.dtype)
        return F.linear(x, weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype} on {self.weight.device}"


def _pinned(weight: Tensor) -> Tensor:
    try:
        return weight.pin_memory()
    except RuntimeError:  # the system's limit of locked memory
        return weight
