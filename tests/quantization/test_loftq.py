"""LoftQ on a Gaussian matrix: the figures of the specification, and what the start values mean."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.quantization import awq, nf4
from ltx2_tuner.quantization.loftq import LoftQ, low_rank


@pytest.fixture(scope="module")
def weight():
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def error(weight: torch.Tensor, base: nf4.Nf4Tensor, loftq: LoftQ) -> float:
    down, up = loftq.factors["layer"]
    return (weight - base.dense() - up @ down).norm().item()


def test_one_iteration_fits_the_residual_of_the_plain_base(weight):
    plain = nf4.quantise(weight, 32)
    assert (weight - plain.dense()).norm().item() == pytest.approx(44.8, abs=0.3)
    loftq = LoftQ(32, 1, 32)
    base = loftq("layer.weight", weight)
    assert torch.equal(base.codes, plain.codes)
    assert error(weight, base, loftq) == pytest.approx(39.8, abs=0.3)


def test_iterations_move_the_base_and_lower_the_error(weight):
    loftq = LoftQ(32, 2, 32)
    base = loftq("layer.weight", weight)
    assert not torch.equal(base.codes, nf4.quantise(weight, 32).codes)
    assert error(weight, base, loftq) == pytest.approx(37.0, abs=0.3)


def test_start_values_are_the_same_in_every_run_and_shaped_for_an_adapter(weight):
    first, second = LoftQ(4, 2, 32), LoftQ(4, 2, 32)
    first("layer.weight", weight[:64].bfloat16())
    second("layer.weight", weight[:64].bfloat16())
    down, up = first.factors["layer"]
    assert (down.shape, up.shape) == ((4, 512), (64, 4))
    assert torch.equal(down, second.factors["layer"][0]) and torch.equal(up, second.factors["layer"][1])


def test_layers_without_adapter_are_quantised_as_usual(weight):
    loftq = LoftQ(4, 2, 32, wanted=lambda name: name == "other.weight")
    base = loftq("layer.weight", weight)
    assert loftq.factors == {} and torch.equal(base.codes, nf4.quantise(weight, 32).codes)


def test_a_weight_that_is_not_finite_starts_as_usual(weight, caplog):
    broken = weight[:32].clone()
    broken[0, 0] = torch.inf
    loftq = LoftQ(4, 2, 32)
    loftq("layer.weight", broken)
    assert loftq.factors == {} and "layer starts from usual values" in caplog.text


def test_factors_undo_column_scales(weight):
    columns = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.5
    loftq = LoftQ(32, 1, 32)
    base = loftq("layer.weight", weight, columns)
    down, up = loftq.factors["layer"]
    plain = (weight - base.dense() / columns).norm()
    assert (weight - base.dense() / columns - up @ down).norm() < 0.95 * plain


def test_low_rank_is_exact_for_low_rank_matrices():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(80, 3, generator=generator) @ torch.randn(3, 60, generator=generator)
    down, up = low_rank(matrix, 3, "name")
    assert torch.allclose(up @ down, matrix, atol=1e-4)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


def test_awq_scales_follow_activation_and_weight():
    weight = torch.tensor([[1.0, -2.0, 4.0], [0.5, 1.0, -8.0]])
    activation = torch.tensor([3.0, 1.0, 0.25])
    importance = torch.tensor([3.0, 2.0, 2.0])
    expected = (importance / importance.mean()) ** 0.25
    assert torch.allclose(awq.column_scale(activation, weight, 0.25), expected)
    assert torch.equal(awq.column_scale(activation, weight, 0.0), torch.ones(3))
    assert awq.column_scale(torch.zeros(3), weight, 1.0).tolist() == pytest.approx([1e-5] * 3)
