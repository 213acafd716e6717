"""Attention kernels behind one function type.

A backend maps q (B, Tq, H, D), k and v (B, Tk, H, D) and an optional additive mask (B, 1 or H, 1 or Tq, Tk) to
(B, Tq, H, D). Kernels that take no such mask hand masked calls to `sdpa`, with the same result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ltx2_tuner.errors import UserError

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
