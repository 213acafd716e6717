"""Rectified flow: noisy tokens and the velocity the model has to predict. All arithmetic in float32.

x_sigma = (1 - sigma) * clean + sigma * noise, target = noise - clean; sigma 0 is clean, 1 is pure noise.
"""

from __future__ import annotations

import torch


def add_noise(clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Noisy tokens (B, T, C) float32 at per-token noise levels `timesteps` (B, 1) or (B, T)."""
    levels = timesteps.float()[..., None]
    return (1 - levels) * clean.float() + levels * noise.float()


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target (B, T, C) float32."""
    return noise.float() - clean.float()
