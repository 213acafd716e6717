"""Element losses and their reduction: per sample over the tokens that count, then over the samples that have any."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOSS_TYPES = ("mse", "mae", "l1", "huber", "smooth_l1")


def element_loss(prediction: torch.Tensor, target: torch.Tensor, kind: str = "mse", delta: float = 1.0) -> torch.Tensor:
    """Loss of every element in float32, same shape as the inputs. delta: where huber turns linear."""
    difference = prediction.float() - target.float()
    if kind == "mse":
        return difference.square()
    size = difference.abs()
    if kind in ("mae", "l1"):
        return size
    return torch.where(size < delta, difference.square() / (2 * delta), size - delta / 2)


@dataclass(frozen=True)
class StreamLoss:
    """Loss of one stream. mean: scalar; per_sample: (B,), 0 where nothing counts; active: (B,) bool."""

    mean: torch.Tensor
    per_sample: torch.Tensor
    active: torch.Tensor

    def weighted(self, sample_weights: torch.Tensor | None) -> torch.Tensor:
        """The mean with a factor per sample (B,); None is all ones."""
        if sample_weights is None:
            return self.mean
        return (self.per_sample * sample_weights).sum() / self.active.sum().clamp(min=1)


def reduce_loss(elements: torch.Tensor, mask: torch.Tensor) -> StreamLoss:
    """Reduce element losses (B, T, C) with the token mask (B, T).

    Samples without a single active token are left out of the mean, so that they do not dilute the others; when no
    sample has one, the mean is 0. Nothing here waits for the device.
    """
    counted = mask.to(elements.dtype)
    tokens = counted.sum(dim=1)
    # where, not multiplication: a masked token must not leak a NaN of its padding into the sum.
    kept = torch.where(mask.bool()[..., None], elements, torch.zeros((), device=elements.device))
    per_sample = kept.sum(dim=(1, 2)) / (elements.shape[2] * tokens.clamp(min=1))
    active = tokens > 0
    mean = (per_sample * active).sum() / active.sum().clamp(min=1)
    return StreamLoss(mean, per_sample, active)
