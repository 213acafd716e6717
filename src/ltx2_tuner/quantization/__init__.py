"""Frozen linear layers in bf16, fp8 and nf4."""

from ltx2_tuner.quantization.frozen import DenseLinear, Fp8Linear, FrozenLinear, Nf4Linear, QuantisedLinear
from ltx2_tuner.quantization.targets import is_quantisable

__all__ = ["DenseLinear", "Fp8Linear", "FrozenLinear", "Nf4Linear", "QuantisedLinear", "is_quantisable"]
