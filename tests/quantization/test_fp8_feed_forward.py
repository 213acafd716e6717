"""A fused fp8 feed-forward against its two layers one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

from ltx2_tuner.lora import LoRAAdapter, LoRALinear
from ltx2_tuner.models.transformer.feed_forward import FeedForward, multiply_each
from ltx2_tuner.quantization import Fp8Linear, fp8, fp8_feed_forward, row_kernels
from ltx2_tuner.quantization.feed_forward import fuse_feed_forwards
from ltx2_tuner.quantization.operators import open_to_inductor
from tests.quantization.feed_forwards import HIDDEN, TOKENS, WIDTH, compiled, expected, run, saved_by


def layer(columns: int, rows: int, bias: bool, dtype: torch.dtype, keep_transposed: bool = True) -> Fp8Linear:
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    return Fp8Linear(*fp8.quantise(weight, "row"), offset, dtype, tensor_cores=True, keep_transposed=keep_transposed)


def make(
    bias: bool = True, dtype: torch.dtype = torch.float32, keep_transposed: bool = True, width: int = WIDTH
) -> FeedForward:
    """With two fp8 layers, fused."""
    module = FeedForward(width, bias=bias)
    module.net[0].proj = layer(width, 4 * width, bias, dtype, keep_transposed)
    module.net[2] = layer(4 * width, width, bias, dtype, keep_transposed)
    fuse_feed_forwards([module])
    return module


def layers_of(module: FeedForward) -> tuple[nn.Module, nn.Module]:
    return module.net[0].proj, module.net[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_both_layers_give(bias, keep_transposed, dtype):
    module = make(bias, dtype, keep_transposed)
    assert module.multiply is fp8_feed_forward.multiply
    wanted = expected(module, dtype=dtype)
    for function in (module, compiled(module)):
        for found, value in zip(run(function, dtype), wanted):
            assert found.dtype == dtype and torch.equal(found, value)


def test_chunks_of_tokens():
    module = make()
    wanted = expected(module)
    module.chunk = 2
    for found, value in zip(run(compiled(module)), wanted):
        torch.testing.assert_close(found, value)


def test_passes_without_gradients():
    module = make()
    x = torch.randn(*TOKENS, WIDTH)
    with torch.no_grad():
        assert torch.equal(compiled(module)(x), multiply_each(module, x))


def test_it_keeps_one_wide_tensor_and_the_stored_ones():
    module = make()
    stored = {tensor.data_ptr() for frozen in layers_of(module) for tensor in frozen.storage().values()}
    others = [tensor for tensor in saved_by(module) if tensor.data_ptr() not in stored]
    assert [tensor.numel() for tensor in others] == [TOKENS[0] * TOKENS[1] * HIDDEN]


def move(frozen: Fp8Linear) -> None:
    """Have a layer's tensors elsewhere, and nothing where they were."""
    before = frozen.storage()
    frozen.rebind({name: tensor.clone() for name, tensor in before.items()})
    for tensor in before.values():
        tensor.data.zero_()  # autograd counts the changes of those it knows


def test_the_stored_tensors_may_be_elsewhere_at_the_time_of_backward():
    """As those of streamed blocks are."""
    module = make()
    wanted = expected(module)
    function = compiled(module)
    layers = layers_of(module)

    def moving(x: Tensor) -> Tensor:
        for frozen in layers:
            move(frozen)
        y = function(x)
        for frozen in layers:
            move(frozen)
        return y

    for found, value in zip(run(moving), wanted):
        assert torch.equal(found, value)


def test_layers_with_adapters_multiply_one_by_one():
    module = make()
    adapter = LoRAAdapter(HIDDEN, WIDTH, 4)
    nn.init.normal_(adapter.lora_up.weight)
    nn.init.normal_(adapter.lora_down.weight)
    alone = run(compiled(module))[0]
    module.net[2] = LoRALinear(module.net[2], adapter)
    y, gradient = run(compiled(module))
    wanted_y, wanted_gradient = expected(module)
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert adapter.lora_up.weight.grad is not None and not torch.equal(y, alone)


def test_other_layers_stay_as_they_are():
    plain = FeedForward(WIDTH)
    other = make()
    other.net[2] = nn.Linear(HIDDEN, WIDTH)
    other.multiply = multiply_each
    fuse_feed_forwards([plain, other])
    assert plain.multiply is other.multiply is multiply_each


def test_rows_too_wide_for_the_kernels_are_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr(row_kernels, "WIDEST", HIDDEN - 1)
    assert make().multiply is multiply_each


def test_compilers_see_the_products_and_keep_what_they_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    open_to_inductor()
    counters.clear()
    seen = []

    def as_it_is(graph: torch.fx.GraphModule, *_: object, **__: object):
        seen.append({str(node.target) for node in graph.graph.nodes})
        run_graph = lambda arguments: graph(*arguments)  # noqa: E731
        run_graph._boxed_call = True
        return run_graph

    module = make()
    for found, value in zip(run(compiled(module, lambda *a: compile_fx(*a, inner_compile=as_it_is))), expected(module)):
        assert torch.cosine_similarity(found.flatten(), value.flatten(), dim=0) > 0.999
    forward, backward = seen
    assert "ltx2_tuner.fp8_gelu_rows.default" in forward
    assert "ltx2_tuner.fp8_gelu_gradient_rows.default" in backward
    assert all("aten.mm.default" in graph for graph in seen)
    assert counters["aot_autograd"]["autograd_cache_miss"] == 1
    assert "autograd_cache_bypass" not in counters["aot_autograd"]


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_on_the_gpu(bias, monkeypatch):
    if not fp8.has_fp8_products("cuda"):
        pytest.skip("this GPU has no row-scaled fp8 products")
    assert row_kernels.available()
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    width, dtype = 256, torch.bfloat16
    module = make(bias, dtype, width=width).cuda()
    how = {"dtype": dtype, "device": "cuda", "shape": (2, 40, width)}
    wanted = expected(module, **how)
    open_to_inductor()
    for found, value in zip(run(compiled(module, "inductor"), **how), wanted):
        assert (found - value).float().norm() / value.float().norm() < 0.02
