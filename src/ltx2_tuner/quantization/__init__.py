"""Frozen linear layers in bf16, fp8 and nf4."""
