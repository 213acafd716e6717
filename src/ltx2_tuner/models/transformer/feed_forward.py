"""The two-layer perceptron of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Projection(nn.Module):
    """Linear and tanh-GELU; keeps the checkpoint's name `net.0.proj`."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """width -> 4 * width -> width, over the whole sequence or, to bound memory, `chunk` tokens at a time (0: whole)."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.chunk = 0
        # The index 1 is where the original has its dropout of 0.
        self.net = nn.ModuleList(
            [_Projection(width, 4 * width, bias), nn.Identity(), nn.Linear(4 * width, width, bias=bias)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        if 0 < self.chunk < x.shape[1]:
            return torch.cat([self.net[2](self.net[0](part)) for part in x.split(self.chunk, dim=1)], dim=1)
        return self.net[2](self.net[0](x))
