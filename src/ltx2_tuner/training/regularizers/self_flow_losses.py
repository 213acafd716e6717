"""The terms of Self-Flow: how close student features are to the teacher's, token by token and over time.

Legend: B batch, F frames, n tokens a frame, D width. Student h and teacher t are (B, F, n, D) in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx2_tuner.training.regularizers.options import SelfFlowOptions

_STILL = 1e-8  # mean squared change of the teacher below which nothing moves


def penalty(similarity: Tensor, kind: str) -> Tensor:
    """What a similarity costs: -c, or 1 - c."""
    return -similarity if kind == "negative_cosine" else 1 - similarity


def token_cosine(projected: Tensor, teacher: Tensor, chosen: Tensor | None) -> Tensor:
    """Mean cosine of tokens (B, T, D) where `chosen` (B, T) is true; of all where nothing is."""
    cosine = F.cosine_similarity(projected, teacher, dim=-1)
    if chosen is None:
        return cosine.mean()
    weights = torch.where(chosen.any(), chosen.float(), torch.ones_like(cosine))
    return (cosine * weights).sum() / weights.sum()


def motion_weights(teacher: Tensor, options: SelfFlowOptions) -> Tensor:
    """(B, F, n): 1, and more where the teacher's features change from frame to frame."""
    strength = options.motion_weight_strength
    if options.motion_weighting == "none" or strength == 0:
        return teacher.new_ones(teacher.shape[:3])
    change = (teacher[:, 1:] - teacher[:, :-1]).square().mean(dim=-1)  # (B, F - 1, n)
    motion = F.pad(change, (0, 0, 0, 1)) + F.pad(change, (0, 0, 1, 0))
    average = motion.mean()
    return torch.where(average > _STILL, 1 + strength * motion / average.clamp(min=_STILL), 1.0)


def frame_cosine(h: Tensor, t: Tensor, motion: Tensor, options: SelfFlowOptions, grid: tuple[int, int]) -> Tensor:
    """Weighted mean cosine of student frames with the teacher's same and neighbouring frames.

    Args:
        motion: (B, F, n) weights, of the student's frame.
        grid: height and width of a frame, with height * width = n.
    """
    if options.temporal_granularity == "frame":
        h, t, motion = h.mean(dim=2, keepdim=True), t.mean(dim=2, keepdim=True), motion.mean(dim=2, keepdim=True)
    h, t = F.normalize(h, dim=-1), F.normalize(t, dim=-1)
    window = None
    if options.temporal_granularity == "patch" and options.patch_spatial_radius:
        window = _window(grid, options.patch_spatial_radius, h.device)
    frames = h.shape[1]
    total, weights = h.new_zeros(()), h.new_zeros(())
    for distance in range(min(options.num_neighbors, frames - 1) + 1):
        weight = 1.0 if distance == 0 else math.exp(-distance / options.temporal_tau)
        for shift in {distance, -distance}:
            mine = slice(max(-shift, 0), frames - max(shift, 0))
            other = slice(max(shift, 0), frames - max(-shift, 0))
            similarity = _match(h[:, mine], t[:, other], window, options)
            total = total + weight * (motion[:, mine] * similarity).sum()
            weights = weights + weight * motion[:, mine].sum()
    return total / weights


def delta_cosine(h: Tensor, t: Tensor, motion: Tensor, options: SelfFlowOptions) -> Tensor:
    """Weighted mean cosine of the changes of student and teacher over one to `delta_num_steps` frames."""
    if options.temporal_granularity == "frame":
        h, t, motion = h.mean(dim=2, keepdim=True), t.mean(dim=2, keepdim=True), motion.mean(dim=2, keepdim=True)
    total, weights = h.new_zeros(()), h.new_zeros(())
    for step in range(1, min(options.delta_num_steps, h.shape[1] - 1) + 1):
        weight = math.exp(-(step - 1) / options.temporal_tau)
        similarity = F.cosine_similarity(h[:, step:] - h[:, :-step], t[:, step:] - t[:, :-step], dim=-1)
        total = total + weight * (motion[:, step:] * similarity).sum()
        weights = weights + weight * motion[:, step:].sum()
    return total / weights


def _match(h: Tensor, t: Tensor, window: Tensor | None, options: SelfFlowOptions) -> Tensor:
    """(B, F', n) cosines of unit tokens with the one at the same place, or with those in a window around it."""
    if window is None:
        return (h * t).sum(dim=-1)
    cosines = h @ t.transpose(-1, -2)  # (B, F', n, n)
    outside = ~window
    if options.patch_match_mode == "hard":
        return cosines.masked_fill(outside, -math.inf).amax(dim=-1)
    logits = (cosines / options.patch_match_temperature).masked_fill(outside, -math.inf)
    return (logits.softmax(dim=-1) * cosines).sum(dim=-1)


def _window(grid: tuple[int, int], radius: int, device: torch.device) -> Tensor:
    """(n, n) true where two places of a grid are at most `radius` rows and columns apart."""
    height, width = grid
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    near_rows = (rows[:, None] - rows).abs() <= radius
    return near_rows & ((columns[:, None] - columns).abs() <= radius)
