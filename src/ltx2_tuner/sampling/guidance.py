"""Guidance terms on x0 predictions and the steps between noise levels. All arithmetic in float32.

Shapes: every tensor of one call has the same shape, (B, T, C) in a sampling run.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scales of one stream. Neutral: cfg 1, stg 0, modality 1, rescale 0.

    Attributes:
        cfg: weight of the difference between the positive and the negative prompt.
        stg: weight of the difference to the pass whose self-attention is bypassed in `stg_blocks`.
        modality: weight of the difference to the pass without attention between picture and sound.
        rescale: 0 keeps the guided prediction's spread, 1 brings it back to the conditional one's.
    """

    cfg: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0
    stg_blocks: tuple[int, ...] = ()


NEUTRAL = Guidance()


def guide(
    cond: torch.Tensor,
    scales: Guidance,
    *,
    uncond: torch.Tensor | None = None,
    perturbed: torch.Tensor | None = None,
    isolated: torch.Tensor | None = None,
) -> torch.Tensor:
    """The guided x0: cond plus every term whose pass was run, rescaled to cond's spread when asked."""
    result = cond
    if uncond is not None:
        result = result + (scales.cfg - 1) * (cond - uncond)
    if perturbed is not None:
        result = result + scales.stg * (cond - perturbed)
    if isolated is not None:
        result = result + (scales.modality - 1) * (cond - isolated)
    if scales.rescale and result is not cond:
        ratio = cond.std() / result.std()
        result = result * (scales.rescale * ratio + 1 - scales.rescale)
    return result


def euler_step(sample: torch.Tensor, x0: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    """One Euler step of the flow ODE. A bfloat16 sample rounds the velocity first, as the reference does."""
    velocity = ((sample.float() - x0.float()) / sigma).to(sample.dtype)
    return (sample.float() + velocity.float() * (next_sigma - sigma)).to(sample.dtype)


def ancestral_step(
    sample: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, sigma: float, next_sigma: float, eta: float = 1.0
) -> torch.Tensor:
    """A stochastic step: go below `next_sigma` deterministically, then add noise back up to it."""
    if next_sigma == 0:
        return x0
    down = next_sigma * (1 + eta * (next_sigma / sigma - 1))
    lower = sample * (down / sigma) + x0 * (1 - down / sigma)
    keep = (1 - next_sigma) / (1 - down)
    renoise = max(0.0, next_sigma**2 - down**2 * keep**2) ** 0.5
    return lower * keep + noise * renoise


def to_velocity(sample: torch.Tensor, x0: torch.Tensor, sigma: float) -> torch.Tensor:
    """v = (x - x0) / sigma."""
    return (sample - x0) / sigma


def to_x0(sample: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """x0 = x - sigma * v, in float32; `sigma` may be per token, (B, T, 1)."""
    return sample.float() - sigma * velocity.float()


def cfg_star_term(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Correction of CFG-Zero* (Fan et al. 2025): the negative prediction is first projected onto the positive one."""
    axes = tuple(range(1, cond.ndim))
    share = (cond * uncond).sum(axes, keepdim=True) / (uncond.square().sum(axes, keepdim=True) + 1e-8)
    return (scale - 1) * (cond - share * uncond)


def apg_term(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, *, eta: float, norm_threshold: float
) -> torch.Tensor:
    """Correction of adaptive projected guidance (Sadat et al. 2024): the parallel part is damped by `eta`."""
    axes = tuple(range(1, cond.ndim))
    difference = cond - uncond
    if norm_threshold > 0:
        norm = difference.square().sum(axes, keepdim=True).sqrt()
        difference = difference * (norm_threshold / norm).clamp(max=1.0)
    share = (difference * cond).sum(axes, keepdim=True) / (cond.square().sum(axes, keepdim=True) + 1e-8)
    parallel = share * cond
    return (scale - 1) * (eta * parallel + difference - parallel)
