"""A dense feed-forward whose products have GELU in them, against its two layers one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ltx2_tuner.lora import LoRAAdapter, LoRALinear
from ltx2_tuner.models.transformer.feed_forward import FeedForward, multiply_each
from ltx2_tuner.quantization import DenseLinear, cublaslt, dense_feed_forward
from ltx2_tuner.quantization.feed_forward import fuse_feed_forwards
from tests.quantization.feed_forwards import HIDDEN, TOKENS, WIDTH, compiled, expected, run, saved_by


def make(bias: bool = True, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> FeedForward:
    generator = torch.Generator().manual_seed(0)

    def layer(columns: int, rows: int) -> DenseLinear:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return DenseLinear(weight.to(dtype), torch.randn(rows, generator=generator).to(dtype) if bias else None)

    module = FeedForward(width, bias=bias)
    module.net[0].proj, module.net[2] = layer(width, 4 * width), layer(4 * width, width)
    module.multiply = dense_feed_forward.multiply
    return module


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products on a CPU count as large ones on a GPU."""
    monkeypatch.setattr(cublaslt, "suits", lambda x, weight: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_both_layers_give(large, bias, dtype):
    module = make(bias, dtype)
    wanted = expected(module, dtype=dtype)
    for found, value in zip(run(compiled(module), dtype), wanted):
        assert found.dtype == dtype
        # Bias and product are rounded once, not one after the other.
        assert (found - value).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * value.norm()


def test_it_keeps_what_gelu_is_applied_to_and_the_weights(large):
    module = make()
    saved = saved_by(module)
    weights = {module.net[0].proj.weight.data_ptr(), module.net[2].weight.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in weights]
    assert [tensor.numel() for tensor in others] == [TOKENS[0] * TOKENS[1] * HIDDEN]


def test_passes_without_gradients(large):
    module = make()
    x = torch.randn(*TOKENS, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(module)(x), multiply_each(module, x))


def test_adapters_that_come_later_are_run(large):
    """The operator knows none."""
    module = make()
    adapter = LoRAAdapter(WIDTH, HIDDEN, 4)
    nn.init.normal_(adapter.lora_up.weight)
    module.net[0].proj = LoRALinear(module.net[0].proj, adapter)
    wanted = expected(module)
    for found, value in zip(run(compiled(module)), wanted):
        torch.testing.assert_close(found, value)


def test_small_products_are_left_to_the_compiler():
    module = make()
    wanted = expected(module)
    assert not cublaslt.suits(torch.randn(4, WIDTH), module.net[0].proj.weight)
    for found, value in zip(run(compiled(module)), wanted):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("available", [False, True])
def test_it_is_used_where_the_library_answers(available, monkeypatch):
    monkeypatch.setattr(cublaslt, "available", lambda: available)
    module = make()
    module.multiply = multiply_each
    fuse_feed_forwards([module])
    assert module.multiply is (dense_feed_forward.multiply if available else multiply_each)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_gpu_compiled(bias):
    if not cublaslt.available():
        pytest.skip("no cuBLASLt")
    module = make(bias, torch.bfloat16, width=2048).to("cuda")
    shape = {"dtype": torch.bfloat16, "device": "cuda", "shape": (1, 512, 2048)}
    assert cublaslt.suits(torch.empty(shape["shape"], dtype=torch.bfloat16, device="cuda"), module.net[0].proj.weight)
    wanted = expected(module, **shape)
    for found, value in zip(run(compiled(module, "inductor"), **shape), wanted):
        assert (found.float() - value.float()).norm() < 1e-2 * value.float().norm()
