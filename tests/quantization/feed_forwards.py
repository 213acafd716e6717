"""Runs of small feed-forwards, plain and compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx2_tuner.models.transformer.feed_forward import FeedForward, multiply_each

WIDTH, HIDDEN = 32, 128
TOKENS = (2, 5)


def run(function: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu", shape=(*TOKENS, WIDTH)):
    """The output and the gradient of x."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=generator).to(device, dtype))
    return y.detach(), x.grad


def expected(module: FeedForward, **keywords: object) -> tuple[Tensor, Tensor]:
    """The same of its layers one after the other."""
    return run(lambda x: multiply_each(module, x), **keywords)


def compiled(module: nn.Module, backend: object = "aot_eager") -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def saved_by(module: nn.Module) -> list[Tensor]:
    """What a compiled pass keeps for its backward pass."""
    saved = []
    function = compiled(module, "aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function(torch.randn(*TOKENS, WIDTH, requires_grad=True))
    return saved
