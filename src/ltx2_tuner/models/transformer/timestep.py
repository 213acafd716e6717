"""Noise levels to modulation rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SINUSOID_WIDTH = 256


def sinusoid(timesteps: Tensor, width: int = SINUSOID_WIDTH) -> Tensor:
    """(...,) float32 timesteps, already times 1000 -> (..., width): cosines first, then sines."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) * -math.log(10000.0) / half
    # Timesteps reach 1000, so the last bit of a frequency shows: round it from float64, alike on every machine.
    angles = timesteps.float().unsqueeze(-1) * exponents.double().exp().float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """The two linears between the sinusoid and the embedded timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_WIDTH, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedded)))


class TimestepModulation(nn.Module):
    """A noise level to `rows` modulation rows of `width` channels, plus the embedding they come from."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepMLP(width)})
        self.linear = nn.Linear(width, rows * width)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) timesteps times 1000 -> modulation (B, K, rows, width) and embedding (B, K, width)."""
        embedder = self.emb["timestep_embedder"]
        embedding = embedder(sinusoid(timesteps).to(embedder.linear_1.weight.dtype))
        rows = self.linear(F.silu(embedding))
        return rows.unflatten(-1, (self.rows, -1)), embedding
