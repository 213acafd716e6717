"""The benchmark that compares gradients, small and on the CPU."""

from __future__ import annotations

import pytest

from benchmarks import gradients

SMALL = ["--layers", "2", "--width_divisor", "16", "--size", "64", "64", "--frames", "9", "--device", "cpu"]


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9999), ("nf4", 0.9999), ("fp8_compute", 0.998)])
def test_the_joint_pass_has_the_gradients_of_the_plain_one(precision: str, least: float) -> None:
    line = gradients.main([*SMALL, "--precision", precision])
    assert line["cosine"] > least and abs(line["norm_ratio"] - 1) < 2e-2
    assert line["worst_cosine"] <= line["cosine"] and not line["recorded"]


def test_another_precision_is_farther_away() -> None:
    assert gradients.main([*SMALL, "--precision", "nf4", "--against", "bf16"])["cosine"] < 0.999
