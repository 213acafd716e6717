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

_MANY_QUERIES = 1024
_QUERY_TILE, _KEY_TILE = 128, 64  # of a thread block: queries in the forward pass, keys in the backward pass
_ENOUGH = 8  # key tiles a head


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled dot-product attention."""
    parts = _query_parts(query.shape[1], key.shape[1]) if mask is None else 1
    if parts == 1:
        return whole_sdpa(query, key, value, mask)
    grouped = query.unflatten(1, (parts, -1)).flatten(0, 1)
    key, value = (tensor.unsqueeze(1).expand(-1, parts, -1, -1, -1).flatten(0, 1) for tensor in (key, value))
    return whole_sdpa(grouped, key, value).reshape(query.shape)


def whole_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same with all queries at once: how they are best split depends on their number."""
    mask = None if mask is None else mask.to(query.dtype)
    result = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return result.transpose(1, 2)


def _query_parts(queries: int, keys: int) -> int:
    """Into how many samples with the same keys the queries of one are split.

    In the backward pass kernels give each group of keys to one thread block, which goes through all queries. With few
    keys, as of a short sound, most of a GPU would have nothing to do.
    """
    if queries < _MANY_QUERIES or keys == 0:
        return 1
    fitting = [parts for parts in range(2, _ENOUGH // -(-keys // _KEY_TILE) + 1) if queries % parts == 0]
    return max(fitting, key=lambda parts: (queries // parts % _QUERY_TILE == 0, parts), default=1)


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


def attention_function(name: str, *, any_length: bool = False) -> AttentionFunction:
    """The backend called `sdpa`, `flash_attn`, `flash3` or `xformers`.

    Args:
        any_length: it is compiled once for any number of tokens, so nothing may depend on that.

    Raises:
        UserError: the backend's package is not installed or does not load.
    """
    if name == "sdpa":
        return whole_sdpa if any_length else sdpa
    package, build = _BACKENDS[name]
    try:
        return build()
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"--{name}: the package {package} does not load ({error}); install it or use --sdpa") from error
