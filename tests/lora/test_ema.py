"""Averages of checkpoints."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.ema import average, betas, power_of

FILES = {
    f"f{index}": {
        "a.lora_up.weight": torch.full((2, 2), float(index)).bfloat16(),
        "a.lora_down.weight": torch.full((2, 2), 2.0 * index),
        "a.alpha": torch.tensor(2.0),
    }
    for index in range(4)
}


def value_of(shares) -> float:
    mean = average(list(FILES), FILES.__getitem__, shares)
    assert {name: tensor.dtype for name, tensor in mean.items()} == {
        name: tensor.dtype for name, tensor in FILES["f0"].items()
    }
    assert mean["a.alpha"] == 2.0
    assert torch.allclose(mean["a.lora_up.weight"].float() * 2, mean["a.lora_down.weight"], rtol=1e-2)
    return mean["a.lora_down.weight"][0, 0].item() / 2


def test_a_constant_beta():
    # 0 -> 0.5 -> 1.25 -> 2.125
    assert value_of(betas(4, 0.5)) == pytest.approx(2.125)


def test_beta_moves_to_beta2():
    assert betas(4, 0.2, 0.6) == pytest.approx([0.2, 0.4, 0.6])
    assert betas(2, 0.2, 0.6) == [0.2]


def test_a_relative_width_drops_the_first_file():
    shares = betas(4, sigma_rel=0.2)
    gamma = power_of(0.2)
    assert gamma**3 + 7 * gamma**2 + (16 - 25) * gamma + 12 - 25 == pytest.approx(0, abs=1e-9)
    assert shares == pytest.approx([0.0, 0.5 ** (gamma + 1), (2 / 3) ** (gamma + 1)])
    without_first = {**FILES, "f0": {name: tensor + 99 for name, tensor in FILES["f0"].items()}}
    without_first["f0"]["a.alpha"] = torch.tensor(2.0)
    found = average(list(FILES), without_first.__getitem__, shares)
    assert found["a.lora_down.weight"][0, 0] / 2 == pytest.approx(value_of(shares), rel=1e-6)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3])
def test_widths_that_have_no_profile(width):
    with pytest.raises(UserError, match="--sigma_rel"):
        betas(3, sigma_rel=width)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a.alpha": torch.tensor(1.0)}, "a.alpha differs"),
        ({"b.alpha": torch.tensor(1.0)}, "differ in 1 tensors"),
        ({"a.lora_up.weight": torch.zeros(3, 2)}, r"a.lora_up.weight is \[2, 2\] in f0 and \[3, 2\] in f1"),
    ],
)
def test_files_of_different_runs(change, expected):
    files = {**FILES, "f1": {**FILES["f1"], **change}}
    with pytest.raises(UserError, match=f"{expected}.*files of one run"):
        average(list(files), files.__getitem__, betas(4))
