"""The two-layer perceptron of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multiply_each(feed_forward: FeedForward, x: Tensor) -> Tensor:
    """x (B, T, width) through one layer, GELU and the other."""
    return feed_forward.net[2](feed_forward.net[0](x))


class _Projection(nn.Module):
    """Linear and tanh-GELU; keeps the checkpoint's name `net.0.proj`."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """width -> 4 * width -> width, over the whole sequence or, to bound memory, `chunk` tokens at a time (0: whole).

    Attributes:
        multiply: what `(feed_forward, x)` gives of x (B, T, width), or of a chunk of it: the same shape.
    """

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.chunk = 0
        self.multiply: Callable[[FeedForward, Tensor], Tensor] = multiply_each
        # The index 1 is where the original has its dropout of 0.
        self.net = nn.ModuleList(
            [_Projection(width, 4 * width, bias), nn.Identity(), nn.Linear(4 * width, width, bias=bias)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        if 0 < self.chunk < x.shape[1]:
            return torch.cat([self.multiply(self, part) for part in x.split(self.chunk, dim=1)], dim=1)
        return self.multiply(self, x)
