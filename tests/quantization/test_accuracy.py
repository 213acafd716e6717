"""What quantised weights lose, on the shapes of the benchmark divided by 8 (the full ones are marked slow)."""

from __future__ import annotations

import pytest

from benchmarks.quantization_error import SHAPES, measure


def _figures(scale: int) -> dict[str, dict]:
    shapes = tuple((rows // scale, columns // scale) for rows, columns in SHAPES)
    return {str(record["method"]): record for record in measure(shapes, 32, "cpu")}


def _check(figures: dict[str, dict]) -> None:
    assert figures["bf16"]["snr_db"] > 55
    assert figures["fp8_base fp8_scaled (block)"]["snr_db"] > 31.5
    assert figures["fp8_base fp8_scaled (block)"]["mae"] == pytest.approx(0.0171, abs=2e-4)
    assert figures["fp8_base fp8_scaled (row)"]["snr_db"] > 31
    assert figures["nf4_base"]["snr_db"] > 20.5
    assert figures["nf4_base"]["mae"] == pytest.approx(0.0678, abs=2e-4)
    assert figures["nf4_base"]["cosine"] == pytest.approx(0.9962, abs=1e-4)
    assert figures["nf4_base loftq_init (rank 32)"]["snr_db"] > figures["nf4_base"]["snr_db"] + 0.2


def test_accuracy_of_every_method():
    _check(_figures(8))


@pytest.mark.slow
def test_accuracy_on_the_shapes_of_the_model():
    _check(_figures(1))
