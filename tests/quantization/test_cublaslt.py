"""Products with GELU by cuBLASLt against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.quantization import cublaslt

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def library() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert cublaslt.available()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.float() - wanted.float()).norm() < 5e-3 * wanted.float().norm())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, dtype", [(2688, torch.bfloat16), (1000, torch.float16)])
def test_gelu_and_its_gradient(rows, dtype, biased):
    x, weight = random(rows, 2048, dtype=dtype), random(8192, 2048, dtype=dtype) * 2048**-0.5
    bias = random(8192, dtype=dtype) if biased else None
    second, gradient = random(2048, 8192, dtype=dtype) * 2048**-0.5, random(rows, 2048, dtype=dtype)
    assert cublaslt.suits(x, weight)
    wanted = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    for _ in range(2):  # the first call tries all algorithms
        hidden, pre = cublaslt.gelu_product(x, weight, bias)
        assert close(pre, wanted) and close(hidden, F.gelu(wanted, approximate="tanh"))
        of_pre = cublaslt.gelu_input_gradient(gradient, second, pre)
        of_hidden = gradient.float() @ second.float()
        assert close(of_pre, torch.ops.aten.gelu_backward(of_hidden, pre.float(), approximate="tanh"))


def test_operands_that_are_not_aligned():
    weight, shifted = random(8192, 2048) * 2048**-0.5, random(1000 * 2048 + 1)[1:].view(1000, 2048)
    hidden, pre = cublaslt.gelu_product(shifted, weight, None)
    assert close(pre, shifted.float() @ weight.float().t())
    assert close(hidden, F.gelu(pre.float(), approximate="tanh"))


def test_a_product_that_a_graph_records_first():
    """Nothing can be tried then."""
    x, weight = random(1001, 2048), random(8192, 2048) * 2048**-0.5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden, _ = cublaslt.gelu_product(x, weight, None)
    x.copy_(random(1001, 2048))
    graph.replay()
    assert close(hidden, F.gelu(x.float() @ weight.float().t(), approximate="tanh"))
