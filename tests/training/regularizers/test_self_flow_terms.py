"""Every term of Self-Flow against its sum written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ltx2_tuner.training.regularizers import SelfFlowOptions
from ltx2_tuner.training.regularizers.self_flow_losses import (
    delta_cosine,
    frame_cosine,
    motion_weights,
    penalty,
    token_cosine,
)

FRAMES, HEIGHT, BREADTH = 3, 2, 2


def features(*, frames: int = FRAMES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, frames, HEIGHT * BREADTH, 5, generator=generator) for _ in range(2))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(cosine_similarity(a, b, dim=0))


def motion_of(t: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights (B, F, n) written out."""
    motion = torch.zeros(t.shape[:3])
    for b in range(t.shape[0]):
        for f in range(t.shape[1]):
            for i in range(t.shape[2]):
                for other in (f - 1, f + 1):
                    if 0 <= other < t.shape[1]:
                        motion[b, f, i] += float((t[b, other, i] - t[b, f, i]).square().mean())
    return 1 + strength * motion / motion.mean()


def test_motion_weights_are_the_teachers_changes():
    _, t = features()
    options = SelfFlowOptions(motion_weighting="teacher_delta", motion_weight_strength=0.7)
    torch.testing.assert_close(motion_weights(t, options), motion_of(t, 0.7))
    assert (motion_weights(t, SelfFlowOptions(motion_weight_strength=0.7)) == 1).all()
    assert (motion_weights(t, SelfFlowOptions(motion_weighting="teacher_delta")) == 1).all()
    assert (motion_weights(t[:, :1].expand(2, 3, 4, 5), options) == 1).all(), "a still clip"


@pytest.mark.parametrize("granularity", ["frame", "patch"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_frame_term_is_the_weighted_mean_over_pairs(granularity, strength):
    h, t = features()
    options = SelfFlowOptions(
        temporal_granularity=granularity,
        num_neighbors=1,
        temporal_tau=0.8,
        motion_weighting="teacher_delta",
        motion_weight_strength=strength,
    )
    motion = motion_of(t, strength)
    total = weights = 0.0
    for b in range(2):
        for f in range(FRAMES):
            for g in range(FRAMES):
                if abs(f - g) > 1:
                    continue
                weight = (1.0 if f == g else math.exp(-1 / 0.8)) * float(motion[b, f].mean())
                if granularity == "frame":
                    similarity = cosine(h[b, f].mean(0), t[b, g].mean(0))
                    total += weight * similarity
                else:
                    scale = weight / float(motion[b, f].mean())
                    total += scale * sum(float(motion[b, f, i]) * cosine(h[b, f, i], t[b, g, i]) for i in range(4)) / 4
                weights += weight
    found = float(frame_cosine(h, t, motion_weights(t, options), options, (HEIGHT, BREADTH)))
    assert found == pytest.approx(total / weights, rel=1e-4)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("radius", [1, 2])
def test_patch_windows_end_at_the_border(mode, radius):
    generator = torch.Generator().manual_seed(3)
    h, t = (torch.randn(1, 2, 12, 5, generator=generator) for _ in range(2))
    height, width = 3, 4
    options = SelfFlowOptions(
        temporal_granularity="patch",
        patch_spatial_radius=radius,
        patch_match_mode=mode,
        patch_match_temperature=0.3,
        num_neighbors=1,
    )
    total = weights = 0.0
    for f in range(2):
        for g in range(2):
            weight = 1.0 if f == g else math.exp(-1)
            for y in range(height):
                for x in range(width):
                    near = [
                        cosine(h[0, f, y * width + x], t[0, g, v * width + u])
                        for v in range(max(y - radius, 0), min(y + radius, height - 1) + 1)
                        for u in range(max(x - radius, 0), min(x + radius, width - 1) + 1)
                    ]
                    if mode == "hard":
                        match = max(near)
                    else:
                        shares = [math.exp(value / 0.3) for value in near]
                        match = sum(share * value for share, value in zip(shares, near)) / sum(shares)
                    total += weight * match
                    weights += weight
    found = float(frame_cosine(h, t, torch.ones(1, 2, 12), options, (height, width)))
    assert found == pytest.approx(total / weights, rel=1e-4)


@pytest.mark.parametrize("granularity", ["frame", "patch"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_delta_term_compares_changes(granularity, steps):
    h, t = features()
    options = SelfFlowOptions(
        temporal_granularity=granularity,
        delta_num_steps=steps,
        temporal_tau=0.5,
        motion_weighting="teacher_delta",
        motion_weight_strength=0.7,
    )
    motion = motion_of(t, 0.7)
    if granularity == "frame":
        h, t, motion = (values.mean(dim=2, keepdim=True) for values in (h, t, motion))
    total = weights = 0.0
    for k in range(1, min(steps, FRAMES - 1) + 1):
        for b in range(2):
            for f in range(FRAMES - k):
                for i in range(h.shape[2]):
                    weight = math.exp(-(k - 1) / 0.5) * float(motion[b, f + k, i])
                    total += weight * cosine(h[b, f + k, i] - h[b, f, i], t[b, f + k, i] - t[b, f, i])
                    weights += weight
    h, t = features()
    found = float(delta_cosine(h, t, motion_weights(t, options), options))
    assert found == pytest.approx(total / weights, rel=1e-4)


def test_token_term_over_all_or_the_masked_tokens():
    h, t = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    every = [cosine(h[b, i], t[b, i]) for b in range(2) for i in range(6)]
    assert float(token_cosine(h, t, None)) == pytest.approx(sum(every) / 12, abs=1e-6)
    chosen = torch.zeros(2, 6, dtype=torch.bool)
    assert float(token_cosine(h, t, chosen)) == pytest.approx(sum(every) / 12, abs=1e-6)
    chosen[0, 2] = chosen[1, 5] = chosen[1, 0] = True
    expected = (every[2] + every[11] + every[6]) / 3
    assert float(token_cosine(h, t, chosen)) == pytest.approx(expected, abs=1e-6)


def test_both_forms_of_the_loss():
    value = torch.tensor(0.3)
    assert float(penalty(value, "negative_cosine")) == pytest.approx(-0.3)
    assert float(penalty(value, "one_minus_cosine")) == pytest.approx(0.7)
