"""NF4 codes against a table worked out by hand, against bitsandbytes, and their accuracy."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.quantization import nf4


def test_codes_of_a_hand_worked_row():
    """Absmax 2: the first eight values are codebook entries, then midpoints, which take the lower code."""
    codebook = torch.tensor(nf4.CODEBOOK)
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    row = torch.cat(
        (codebook[[0, 15, 7, 8, 1, 14, 3, 12]], midpoints[[0, 6, 7, 14]], torch.tensor([0.04, 0.9, 0, -0.9]))
    )
    packed = nf4.quantise(2 * row[None], 16)
    pairs = [(0, 15), (7, 8), (1, 14), (3, 12), (0, 6), (7, 14), (8, 15), (7, 0)]
    assert packed.codes.tolist() == [[16 * high + low for high, low in pairs]]
    assert packed.scale.tolist() == [[[2.0]]]
    expected = 2 * codebook[torch.tensor([code for pair in pairs for code in pair])]
    assert torch.equal(packed.dense(), expected[None])


def test_scales_have_the_dtype_of_the_weight_and_a_floor():
    packed = nf4.quantise(torch.zeros(2, 64, dtype=torch.bfloat16), 32)
    assert packed.scale.dtype == torch.bfloat16 and packed.scale.shape == (2, 2, 1)
    assert packed.block_size == 32
    assert torch.equal(packed.dense(), torch.zeros(2, 64))
    assert packed.scale.float().allclose(torch.tensor(1e-8))


@pytest.mark.parametrize("block_size", [32, 64])
def test_codes_equal_those_of_bitsandbytes(block_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    ours = nf4.quantise(weight, block_size)
    assert torch.equal(ours.codes.reshape(-1, 1), packed)
    assert torch.equal(ours.scale.reshape(-1), state.absmax)
    assert torch.equal(ours.dense(), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("size", [0, 8, 24, 33])
def test_block_size_must_be_a_power_of_two(size):
    with pytest.raises(ValueError, match="power of two"):
        nf4.check_block_size(size)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_gpu_equals_cpu(block_size):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    host, device = nf4.quantise(weight, block_size), nf4.quantise(weight.cuda(), block_size)
    assert torch.equal(host.codes, device.codes.cpu()) and torch.equal(host.scale, device.scale.cpu())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(host.dense(dtype), device.dense(dtype).cpu())
