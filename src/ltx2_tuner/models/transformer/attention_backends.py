"""Attention kernels behind one function type.

A backend maps q (B, Tq, H, D), k and v (B, Tk, H, D) and an optional additive mask (B, 1 or H, 1 or Tq, Tk) to
(B, Tq, H, D). Kernels that take no such mask hand masked calls to `sdpa`, with the same result.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)
_TOLERANCE = 2e-2

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled dot-product attention."""
    mask = None if mask is None else mask.to(query.dtype)
    result = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return result.transpose(1, 2)


def _flash_attn() -> AttentionFunction:
    kernel = importlib.import_module("flash_attn").flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return sdpa(query, key, value, mask) if mask is not None else kernel(query, key, value)

    return attend


def _flash3() -> AttentionFunction:
    kernel = importlib.import_module("flash_attn_interface").flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return sdpa(query, key, value, mask)
        result = kernel(query, key, value)
        return result[0] if isinstance(result, tuple) else result  # some releases also return the log-sum-exp

    return attend


def _xformers() -> AttentionFunction:
    kernel = importlib.import_module("xformers.ops").memory_efficient_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return sdpa(query, key, value, mask) if mask is not None else kernel(query, key, value)

    return attend


_BACKENDS: dict[str, tuple[str, Callable[[], AttentionFunction]]] = {
    "flash_attn": ("flash_attn", _flash_attn),
    "flash3": ("flash_attn_interface (FlashAttention 3)", _flash3),
    "xformers": ("xformers", _xformers),
}


def attention_function(name: str) -> AttentionFunction:
    """The backend called `sdpa`, `flash_attn`, `flash3` or `xformers`.

    Raises:
        UserError: the backend's package is not installed or does not load.
    """
    if name == "sdpa":
        return sdpa
    package, build = _BACKENDS[name]
    try:
        return build()
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"--{name}: the package {package} does not load ({error}); install it or use --sdpa") from error


def usable_backend(name: str, device: torch.device) -> str:
    """`name`, or `sdpa` with a warning where the backend's kernel fails here or gives other numbers than torch's.

    Raises:
        UserError: the backend's package is not installed or does not load.
    """
    if name == "sdpa":
        return name
    attend = attention_function(name)
    try:
        error = _difference(attend, device)
    except Exception as failure:  # whatever a third-party kernel raises on a card it does not know
        logger.warning("--%s does not run on this device (%s); --sdpa is used", name, failure)
        return "sdpa"
    if not error <= _TOLERANCE:
        logger.warning("--%s differs from torch's attention by %.2g; --sdpa is used", name, error)
        return "sdpa"
    return name


def _difference(attend: AttentionFunction, device: torch.device) -> float:
    """Largest relative difference from torch's attention, of outputs and input gradients, on random inputs."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for function in (attend, sdpa):
        generator.manual_seed(0)
        tensors = [torch.randn(2, 24, 2, 64, generator=generator) for _ in range(3)]
        inputs = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in tensors]
        output = function(*inputs)
        output.float().square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    pairs = [(one.float(), other.float()) for one, other in zip(*results)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
