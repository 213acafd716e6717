"""What both autoencoders share: pixel norm and the statistics that normalise latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelNorm(nn.Module):
    """`x / sqrt(mean over channels of x^2 + eps)` for (B, C, ...), no parameters.

    The mean square is formed in float32 whatever the dtype of `x`; the result has the dtype of `x`.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Channels last is how the convolutions keep activations, so the moved view is contiguous and the op fused.
        return F.rms_norm(x.movedim(1, -1), (x.shape[1],), eps=self.eps).movedim(-1, 1)


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel; identity until loaded from a checkpoint.

    `normalise` and `denormalise` take latents with the channels in dimension `dim`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("std-of-means", torch.ones(channels))
        self.register_buffer("mean-of-means", torch.zeros(channels))

    def normalise(self, latents: Tensor, dim: int = 1) -> Tensor:
        mean, std = self._shaped(latents, dim)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor, dim: int = 1) -> Tensor:
        mean, std = self._shaped(latents, dim)
        return latents * std + mean

    def _shaped(self, latents: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        shape = [1] * latents.ndim
        shape[dim] = -1
        mean, std = self.get_buffer("mean-of-means"), self.get_buffer("std-of-means")
        return mean.to(latents).view(shape), std.to(latents).view(shape)
