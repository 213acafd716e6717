"""Scaled fp8 weights: scales, saturation, every scale shape in circulation."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.quantization import fp8

E4M3 = torch.float8_e4m3fn


def test_scales_put_each_group_on_the_largest_code():
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    codes, scale = fp8.quantise(weight, "block")
    assert scale.shape == (4, 2, 1)
    assert torch.equal(scale[..., 0], weight.view(4, 2, 64).abs().amax(-1) / 448)
    assert torch.equal(codes.float().abs().view(4, 2, 64).amax(-1), torch.full((4, 2), 448.0))
    codes, scale = fp8.quantise(weight, "row")
    assert scale.shape == (4, 1)
    assert torch.equal(codes.float().abs().amax(-1), torch.full((4,), 448.0))


def test_rows_that_no_block_divides_get_one_scale():
    codes, scale = fp8.quantise(torch.ones(3, 96, dtype=torch.bfloat16), "block")
    assert scale.shape == (3, 1) and scale.dtype == torch.bfloat16
    assert codes.shape == (3, 96)


def test_plain_cast_saturates_and_drops_nan():
    codes, scale = fp8.quantise(torch.tensor([[1e6, -1e6, float("nan"), 2.0**-11]]), "none")
    assert scale is None
    assert codes.float().tolist() == [[448.0, -448.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 2, 1)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantising_rounds_once(shape, scale_dtype, dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(4, 16, generator=generator).to(E4M3)
    scale = torch.rand(shape, generator=generator).to(scale_dtype)
    factors = scale.float().repeat_interleave(8, 1)[..., 0] if len(shape) == 3 else scale.float()
    expected = codes.float() * factors
    found = fp8.dequantise(codes, scale, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


def test_activations_keep_their_nan():
    codes, scale = fp8.quantise_rows(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    dense = codes.float() * scale
    assert dense[0].isnan().any() and dense[1].tolist() == [1.0, 2.0]


def test_products_of_rows():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 32, generator=generator), torch.randn(8, 32, generator=generator)
    found = fp8.product(*fp8.quantise_rows(left), *fp8.quantise_rows(right), torch.float32)
    error = (found - left @ right.t()).norm() / (left @ right.t()).norm()
    assert error < 0.05


def test_the_cpu_has_no_fp8_products():
    assert not fp8.has_fp8_products("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(), (1,), (40, 1), (40, 3, 1)])
@pytest.mark.parametrize("codes_dtype", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_cpu(shape, codes_dtype, dtype):
    """All codes but those that stand for no number, in a matrix that no kernel block divides."""
    codes = torch.arange(40 * 96).remainder(256).to(torch.uint8).view(codes_dtype).float().nan_to_num(0, 1, -1)
    codes = codes.to(codes_dtype).view(40, 96)
    for scale_dtype in (torch.float32, torch.bfloat16):
        scale = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) / 8).to(scale_dtype)
        found = fp8.dequantise(codes.cuda(), scale.cuda(), dtype)
        assert torch.equal(found.cpu(), fp8.dequantise(codes, scale, dtype))
