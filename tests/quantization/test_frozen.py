"""Frozen layers against dense ones: outputs, input gradients, storage, moving, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ltx2_tuner.quantization import DenseLinear, Fp8Linear, FrozenLinear, Nf4Linear, fp8, nf4

ROWS, COLUMNS = 48, 128
MEMBERS = ("dense", "fp8 block", "fp8 row", "fp8 matrix", "fp8 plain", "nf4", "nf4 columns")


def make(member: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(ROWS, COLUMNS, generator=generator) / 8).to(dtype)
    offset = torch.randn(ROWS, generator=generator).to(dtype) if bias else None
    if member == "dense":
        return DenseLinear(weight, offset)
    if member.startswith("nf4"):
        columns = torch.rand(COLUMNS, generator=generator) + 0.5 if "columns" in member else None
        return Nf4Linear(nf4.quantise(weight), offset, dtype, columns)
    if member == "fp8 matrix":
        return Fp8Linear((weight.float() * 100).to(torch.float8_e4m3fn), torch.tensor(0.01), offset, dtype)
    mode = {"fp8 plain": "none"}.get(member, member.split()[-1])
    return Fp8Linear(*fp8.quantise(weight, mode), offset, dtype)


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("member", MEMBERS)
def test_output_and_input_gradient_equal_those_of_the_dense_layer(member, bias):
    layer = make(member, bias)
    x, reference = inputs(), inputs()
    weight = layer.dense(torch.float32)
    y, expected = layer(x), F.linear(reference, weight, layer.bias)
    assert torch.equal(y, expected)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    assert torch.allclose(x.grad, reference.grad, rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("member", MEMBERS)
def test_members_are_linear_layers(member):
    layer = make(member)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (COLUMNS, ROWS)
    assert layer.weight.shape == (ROWS, COLUMNS) and layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, layer.dense(torch.float32))


@pytest.mark.parametrize("member", MEMBERS)
def test_nothing_is_saved_for_backward(member):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        make(member)(inputs())
    assert saved == []


@pytest.mark.parametrize("member", MEMBERS)
def test_storage_can_live_in_one_buffer_and_come_back_before_backward(member):
    """What a block store does: the tensors are elsewhere between forward and backward."""
    layer = make(member, dtype=torch.bfloat16)
    storage = layer.storage()
    x = inputs()
    expected = layer(x)
    expected.sum().backward()
    gradient, x.grad = x.grad, None

    sizes = [-(-tensor.nbytes // 16) * 16 for tensor in storage.values()]
    slab = torch.zeros(sum(sizes), dtype=torch.uint8)
    views, start = {}, 0
    for (name, tensor), size in zip(storage.items(), sizes):
        views[name] = slab[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views[name].copy_(tensor)
        start += size
    copy = slab.clone()
    layer.rebind(views)
    y = layer(x)
    assert torch.equal(y, expected)
    slab.zero_()
    slab.copy_(copy)
    y.sum().backward()
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("member", MEMBERS[1:])
def test_casting_the_module_leaves_stored_weights_alone(member):
    layer = make(member)
    before = layer.dense(torch.float32)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dense(torch.float32), before)
    assert layer.bias.dtype == torch.bfloat16
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.storage().values()} == {"meta"}


def test_autocast_decides_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert make("nf4")(inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize("member", MEMBERS)
def test_compiled_layers_keep_no_dense_weight(member):
    model = nn.Sequential(make(member), nn.GELU())
    x, reference = inputs(), inputs()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = compiled(x)
    stored = {tensor.data_ptr() for tensor in model[0].storage().values()}
    assert all(tensor.shape != (ROWS, COLUMNS) or tensor.data_ptr() in stored for tensor in saved)
    expected = model(reference)
    y.sum().backward()
    expected.sum().backward()
    assert torch.allclose(y, expected, atol=1e-6) and torch.allclose(x.grad, reference.grad, atol=1e-6)


@pytest.mark.parametrize("scale", [None, (), (ROWS, 1)])
@pytest.mark.parametrize("keep_transposed", [False, True])
def test_fp8_products_forward_and_backward(scale, keep_transposed):
    """Both factors rounded to three mantissa bits: a few percent, and no bias in the gradient."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(ROWS, COLUMNS, generator=generator) * 50).to(torch.float8_e4m3fn)
    scale = None if scale is None else torch.rand(scale, generator=generator) / 400
    exact = Fp8Linear(codes, scale, torch.randn(ROWS, generator=generator), torch.float32)
    layer = Fp8Linear(codes, scale, exact.bias.data, torch.float32, True, keep_transposed)
    assert layer.tensor_cores and torch.equal(layer.weight, exact.weight)
    x, reference = inputs(), inputs()
    y, expected = layer(x), exact(reference)
    assert (y - expected).norm() / expected.norm() < 0.04
    direction = torch.randn(y.shape, generator=generator)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    assert (x.grad - reference.grad).norm() / reference.grad.norm() < 0.04


def test_fp8_products_need_row_scales_and_tiles_of_16():
    weight = torch.randn(32, 128)
    assert not Fp8Linear(*fp8.quantise(weight, "block"), None, torch.float32, tensor_cores=True).tensor_cores
    assert not Fp8Linear(*fp8.quantise(weight[:30], "row"), None, torch.float32, tensor_cores=True).tensor_cores


@pytest.mark.gpu
def test_fp8_products_on_the_gpu():
    if not fp8.has_fp8_products("cuda"):
        pytest.skip("this GPU has no row-scaled fp8 products")
    weight = torch.randn(256, 512).bfloat16()
    layer = Fp8Linear(
        *fp8.quantise(weight, "row"), torch.randn(256).bfloat16(), torch.bfloat16, tensor_cores=True
    ).cuda()
    x = torch.randn(3, 40, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    expected = F.linear(x, weight.cuda(), layer.bias)
    assert (y - expected).float().norm() / expected.float().norm() < 0.06
    direction = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * direction).sum(), x)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    assert (found - wanted).float().norm() / wanted.float().norm() < 0.06
