"""LoRALinear against the written-out formula, in values, gradients and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ltx2_tuner.lora import LoRAAdapter, LoRALinear
from ltx2_tuner.quantization.formats import WeightFormat, freeze
from ltx2_tuner.quantization.frozen import DenseLinear


def make(rank=3, alpha=6.0, dtype=torch.float32, frozen=True, **dropouts) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(10, 7).to(dtype).requires_grad_(False)
    if frozen:
        base = DenseLinear(base.weight.data, base.bias.data)
    adapter = LoRAAdapter(10, 7, rank, alpha, **dropouts)
    nn.init.normal_(adapter.lora_down.weight)
    nn.init.normal_(adapter.lora_up.weight)
    return LoRALinear(base, adapter)


def reference(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    adapter = layer.adapter
    low = x @ adapter.lora_down.weight.T @ adapter.lora_up.weight.T
    return x @ layer.base.weight.T + layer.base.bias + adapter.multiplier * adapter.alpha_value / adapter.rank * low


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 4, 10)])
def test_values_and_gradients_follow_the_formula(shape, frozen):
    layer = make(frozen=frozen)
    layer.adapter.multiplier = -0.7
    x, again = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    weights = torch.randn(7, generator=torch.Generator().manual_seed(2))
    parameters = list(layer.adapter.parameters())
    expected = torch.autograd.grad((reference(layer, again) ** 2 @ weights).sum(), [again, *parameters])
    out = layer(x)
    torch.testing.assert_close(out, reference(layer, again), rtol=1e-5, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad((out**2 @ weights).sum(), [x, *parameters]), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_without_grad_the_result_is_the_same():
    layer, x = make(), torch.randn(2, 4, 10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_input_without_gradient_still_trains_the_adapter():
    layer = make()
    layer(torch.randn(4, 10)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.adapter.parameters())
    assert layer.base.weight.grad is None


def test_autocast_computes_in_bfloat16_and_keeps_no_float32_copy():
    layer = make(dtype=torch.bfloat16)
    x = torch.randn(64, 10).bfloat16().requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    activations = [t for t in saved if t.shape[0] == 64]
    assert {t.dtype for t in activations} == {torch.bfloat16}
    assert {t.data_ptr() for t in activations if t.shape == x.shape} == {x.data_ptr()}
    out.float().sum().backward()
    assert layer.adapter.lora_down.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), reference(layer.float(), x.float()), rtol=3e-2, atol=1e-1)


def test_without_autocast_the_sum_is_taken_in_float32_and_rounded_once():
    layer = make(dtype=torch.bfloat16)
    x = torch.randn(8, 10).bfloat16()
    base = layer.base(x)
    low = x.float() @ layer.adapter.lora_down.weight.T * layer.adapter.scale @ layer.adapter.lora_up.weight.T
    assert torch.equal(layer(x), (base + low).bfloat16())


def test_disabled_or_zero_multiplier_is_the_base_to_the_bit():
    layer, x = make(), torch.randn(3, 10)
    base = layer.base(x)
    layer.adapter.enabled = False
    assert torch.equal(layer(x), base)
    layer.adapter.enabled, layer.adapter.multiplier = True, 0.0
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("alpha", [None, 0, 0.0])
def test_alpha_of_nothing_means_scale_one(alpha):
    assert LoRAAdapter(4, 4, 8, alpha).scale == 1.0


def test_element_dropout_zeroes_about_p_and_keeps_the_mean():
    layer = make(rank=4, dropout=0.25)
    layer.base.weight.zero_(), layer.base.bias.zero_()
    with torch.no_grad():
        layer.adapter.lora_down.weight.copy_(torch.ones(4, 10) / 10)
        layer.adapter.lora_up.weight.copy_(torch.eye(7, 4))
    layer.adapter.alpha_value = 4.0
    torch.manual_seed(3)
    hidden = layer(torch.ones(2, 3000, 10))[..., :4]
    assert sorted(hidden.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert (hidden == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_rank_dropout_is_one_mask_per_sample_and_rank():
    layer = make(rank=4, rank_dropout=0.5)
    layer.base.weight.zero_(), layer.base.bias.zero_()
    with torch.no_grad():
        layer.adapter.lora_down.weight.copy_(torch.ones(4, 10) / 10)
        layer.adapter.lora_up.weight.copy_(torch.eye(7, 4))
    layer.adapter.alpha_value = 4.0
    torch.manual_seed(3)
    hidden = layer(torch.ones(500, 3, 10))[..., :4]
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert set(hidden.unique().tolist()) == {0.0, 2.0}
    assert (hidden == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_module_dropout_drops_the_whole_adapter_unscaled():
    layer, x = make(module_dropout=0.5), torch.randn(2, 10)
    base, whole = layer.base(x), reference(layer, x)
    torch.manual_seed(0)
    outcomes = [layer(x) for _ in range(60)]
    dropped = sum(torch.allclose(out, base, atol=1e-5) for out in outcomes)
    kept = sum(torch.allclose(out, whole, atol=1e-4) for out in outcomes)
    assert dropped + kept == 60 and 15 < dropped < 45


def test_no_dropout_outside_training():
    layer, x = make(dropout=0.5, rank_dropout=0.5, module_dropout=0.5).eval(), torch.randn(5, 3, 10)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation_sees_the_same_masks(frozen):
    layer = make(frozen=frozen, rank=6, dropout=0.3, rank_dropout=0.3, module_dropout=0.1)
    x = torch.randn(3, 5, 10).requires_grad_()

    def gradients(function):
        torch.manual_seed(11)
        layer.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in layer.adapter.parameters())]

    plain = gradients(layer)
    for got, wanted in zip(gradients(lambda x: checkpoint(layer, x, use_reentrant=False)), plain):
        assert torch.equal(got, wanted)


def test_dropout_gradients_of_one_node_are_those_of_plain_operations():
    gradients = []
    for frozen in (True, False):
        layer = make(frozen=frozen, rank=6, dropout=0.3, rank_dropout=0.3)
        torch.manual_seed(5)
        x = torch.randn(3, 5, 10).requires_grad_()
        layer(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.adapter.parameters())])
    for got, wanted in zip(*gradients):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_quantised_bases(kind):
    base = freeze(
        "transformer_blocks.0.ff.net.2.weight", torch.randn(64, 64), torch.randn(64), WeightFormat(kind), torch.float32
    )
    adapter = LoRAAdapter(64, 64, 3)
    nn.init.normal_(adapter.lora_up.weight)
    nn.init.normal_(adapter.lora_down.weight)
    x = torch.randn(5, 64).requires_grad_()
    out = LoRALinear(base, adapter)(x)
    expected = base(x) + x @ adapter.delta().T
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    got, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)


def test_compiled_layers_give_the_same():
    layer = make(rank=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.zero_grad()
        out = function(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.adapter.parameters())])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_an_adapter_on_an_adapted_layer_adds_up():
    first = make()
    second = LoRALinear(first, LoRAAdapter(10, 7, 2))
    nn.init.normal_(second.adapter.lora_up.weight)
    nn.init.normal_(second.adapter.lora_down.weight)
    x = torch.randn(4, 10).requires_grad_()
    expected = reference(first, x) + x @ second.adapter.delta().T
    torch.testing.assert_close(second(x), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(second(x).sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], rtol=1e-5, atol=1e-4
    )


def test_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank 0"):
        LoRAAdapter(4, 4, 0)
