"""The kernels that quantise rows against torch: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ltx2_tuner.quantization import row_kernels

WIDTHS = (96, 1000, 4096, 16384)


def arguments(width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """gradient, pre (a row of zeros in each), bias, factor."""
    generator = torch.Generator().manual_seed(width)
    gradient, pre = (torch.randn(4, width, generator=generator) * size for size in (0.1, 2.0))
    gradient[0] = pre[1] = 0.0
    bias, factor = torch.randn(width, generator=generator), torch.rand(width, 1, generator=generator) / 100
    return *(tensor.to(device, dtype) for tensor in (gradient, pre, bias)), factor.to(device)


def pairs(width: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[tuple[Tensor, Tensor], ...]]:
    """What the kernels give, and torch."""
    gradient, pre, bias, factor = arguments(width, dtype, device)
    kernels = row_kernels
    found = {}
    for name, offset in (("", None), (" with bias", bias)):
        found[f"gelu{name}"] = kernels.gelu_rows(pre, offset), kernels.plain_gelu_rows(pre, offset)
        given = gradient, pre, offset, factor
        found[f"gradient{name}"] = kernels.gelu_gradient_rows(*given), kernels.plain_gelu_gradient_rows(*given)
    return found


def check(width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Same scales; same codes but for few, which are one off."""
    for name, ((codes, scale), (wanted_codes, wanted_scale)) in pairs(width, dtype, device).items():
        label = f"{name}, {width}, {dtype}"
        codes, wanted_codes = codes.to(torch.float8_e4m3fn).float(), wanted_codes.float()
        torch.testing.assert_close(scale, wanted_scale, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0.0)
        off = codes != wanted_codes
        assert off.float().mean() < 2e-3, f"{label}: {off.float().mean()}"
        step = (wanted_codes.abs() / 8).clamp(min=2.0**-9)
        assert ((codes - wanted_codes).abs() <= 1.01 * step).all(), label


def interpreted() -> None:
    """The interpreter rounds neither to e4m3 nor to bf16 as devices do: torch rounds the codes, and halves come in."""
    row_kernels.CODES = torch.float32
    for width in WIDTHS:
        for dtype in (torch.float16, torch.float32):
            check(width, dtype)
    pre = torch.ones(2, 96)
    pre[0, 3] = float("nan")
    codes, _ = row_kernels.gelu_rows(pre, None)
    assert codes[0, 3].isnan() and not codes[1].isnan().any(), "a step that went wrong must show"
    beyond, scale = row_kernels.gelu_rows(torch.tensor([[-60000.0, -30.0, 0.0, 30.0, 60000.0]]), None)
    torch.testing.assert_close(beyond * scale, torch.tensor([[0.0, 0.0, 0.0, 30.0, 60000.0]]))


def test_kernels_by_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from tests.quantization.test_row_kernels import interpreted; interpreted()"]
    path = os.pathsep.join(entry or "." for entry in sys.path)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_without_a_gpu_there_are_none():
    if not torch.cuda.is_available():
        assert not row_kernels.available()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [*WIDTHS, row_kernels.WIDEST])
def test_kernels_on_the_gpu(width):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not know e4m3")
    assert row_kernels.available()
    check(width, torch.bfloat16, "cuda")
