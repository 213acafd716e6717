"""Adapters and optimizers on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ltx2_tuner.lora import LoRAAdapter, LoRALinear
from ltx2_tuner.quantization.frozen import DenseLinear
from ltx2_tuner.training.optimizers import OptimizerOptions, create_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make(width: int = 512) -> LoRALinear:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(width, width, device="cuda", generator=generator).bfloat16() * width**-0.5
    adapter = LoRAAdapter(width, width, 16).cuda()
    adapter.compute_dtype = torch.bfloat16
    nn.init.normal_(adapter.lora_down.weight, std=width**-0.5, generator=generator)
    nn.init.normal_(adapter.lora_up.weight, generator=generator)
    return LoRALinear(DenseLinear(weight, torch.zeros(width, device="cuda").bfloat16()), adapter)


def run(function, layer: LoRALinear) -> list[torch.Tensor]:
    """Output, input gradient and adapter gradients."""
    x = torch.randn(2, 64, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    x.requires_grad_()
    layer.zero_grad()
    out = function(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.adapter.parameters())]


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_follows_the_float32_formula(compiled):
    layer = make()
    adapter = layer.adapter

    def formula(x):
        down, up = adapter.lora_down.weight, adapter.lora_up.weight
        return x.float() @ layer.weight.float().T + x.float() @ down.T @ up.T

    expected = run(formula, layer)
    for got, wanted in zip(run(torch.compile(layer) if compiled else layer, layer), expected):
        error = (got.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < 1e-2, error


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_optimizers_step_on_the_device(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    layer = make()
    optimizer = create_optimizer(
        OptimizerOptions(name, {}, 1e-3), [{"params": list(layer.adapter.parameters()), "lr": 1e-3}]
    )
    assert optimizer.defaults.get("fused", True)
    before = layer.adapter.lora_up.weight.detach().clone()
    run(layer, layer)
    optimizer.step()
    moved = (layer.adapter.lora_up.weight.detach() - before).abs()
    assert moved.max() > 0 and moved.isfinite().all()
