from __future__ import annotations

import math

import pytest
import torch

from ltx2_tuner.training.sigmas import SigmaSampler, histogram_picture, histogram_text, token_shift


def draw(sampler: SigmaSampler, count: int = 4096, tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    return sampler.sample(torch.full((count,), tokens), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "shift"),
    [(64, 0.60625), (126, 0.62845), (384, 0.72083), (1024, 0.95), (1536, 1.13333), (2040, 1.3138), (6144, 2.78333)],
)
def test_shift_follows_the_published_table(tokens, shift):
    assert token_shift(tokens) == pytest.approx(shift, abs=1e-5)


def test_a_bucket_value_becomes_its_normal_quantile():
    sampler = SigmaSampler(mode="legacy", shift=0.0)
    sigma = sampler.sample(torch.full((1,), 10), torch.Generator(), buckets=torch.tensor([0.8413447]))
    assert sigma.item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-5)


def test_the_number_of_draws_does_not_depend_on_the_uniform_probability():
    after = []
    for probability in (0.0, 0.1, 1.0):
        generator = torch.Generator().manual_seed(1)
        SigmaSampler(uniform_prob=probability).sample(torch.full((5,), 64), generator)
        after.append(torch.rand(1, generator=generator).item())
    assert after[0] == after[1] == after[2]


def test_a_range_rescales_by_default():
    plain, ranged = draw(SigmaSampler()), draw(SigmaSampler(minimum=0.2, maximum=0.6))
    torch.testing.assert_close(ranged, 0.2 + 0.4 * plain)


def test_preserving_the_shape_rejects_instead():
    values = draw(SigmaSampler(minimum=0.4, maximum=0.6, preserve_shape=True))
    assert values.min() >= 0.4 and values.max() <= 0.6
    inside = [v for v in draw(SigmaSampler()).tolist() if 0.4 <= v <= 0.6]
    assert values[: len(inside)].tolist() == inside


def test_an_impossible_range_is_clamped_with_a_warning(caplog):
    values = draw(SigmaSampler(mode="legacy", shift=30.0, maximum=0.1, preserve_shape=True), count=3)
    assert values.tolist() == pytest.approx([0.1] * 3)
    assert "clamping" in caplog.text


def test_each_sample_is_shifted_by_its_own_token_count():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([64, 6144]).repeat_interleave(2000)
    sigma = SigmaSampler(mode="legacy").sample(tokens, generator)
    assert sigma[2000:].mean() - sigma[:2000].mean() > 0.2


def test_the_histogram_has_forty_lines_of_25_values():
    lines = histogram_text(draw(SigmaSampler())).splitlines()
    assert len(lines) == 40
    assert lines[0].startswith("   0-  24") and lines[-1].startswith(" 975- 999")
    assert sum(int(line[9:17]) for line in lines) == 4096
    assert histogram_picture(draw(SigmaSampler())).shape == (400, 800, 3)
