"""Multi-head attention with normed queries and keys, rotary positions and per-head gates.

B batch, T query tokens, S key tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.transformer.attention_backends import AttentionFunction, sdpa
from ltx2_tuner.models.transformer.perturbations import Skip
from ltx2_tuner.models.transformer.rope import RopeTable, apply_rope

Heads = tuple[Tensor, Tensor, Tensor, Tensor | None]
Formation = Callable[["Attention", Tensor, Tensor | None, RopeTable | None, RopeTable | None], Heads]

DEFAULT_QUERY_CHUNK = 1024  # tokens


class RMSNorm(nn.Module):
    """RMS norm over the channels with a learned weight; float32 inside, the input's dtype outside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(x.dtype)


def form_each(
    attention: Attention, x: Tensor, context: Tensor | None, rope: RopeTable | None, key_rope: RopeTable | None
) -> Heads:
    """Queries of x, keys and values of the context, gate logits of x, one product each; see `Attention.form`."""
    context = x if context is None else context
    gates = None if attention.to_gate_logits is None else attention.to_gate_logits(x)
    query = attention.heads_of(attention.to_q(x), attention.q_norm, rope)
    key = attention.heads_of(attention.to_k(context), attention.k_norm, key_rope)
    return query, key, attention.heads_of(attention.to_v(context)), gates


def project_out(attention: Attention, x: Tensor) -> Tensor:
    """The heads' results (B, T, H*D) to what the attention adds (B, T, query_width)."""
    return attention.to_out[0](x)


class Attention(nn.Module):
    """Attention of `query_width` wide tokens to `context_width` wide ones, back to `query_width`.

    Attributes:
        form: queries, keys and values (B, T or S, H, D), normed and rotated, and gate logits (B, T, H), None where
            there are no gates, of `(attention, x, context, rope, key_rope)`; context None is x itself.
        project_out: what `(attention, results)` returns of the heads' results.
        attend: the kernel, see `attention_backends`.
        split: None, "batch" (one kernel call per sample) or "query" (groups of `query_chunk` queries).
    """

    def __init__(
        self, query_width: int, context_width: int, heads: int, head_dim: int, *, gated: bool, eps: float
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(query_width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.q_norm = RMSNorm(inner, eps)
        self.k_norm = RMSNorm(inner, eps)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_width)])
        self.to_gate_logits = nn.Linear(query_width, heads) if gated else None
        self.form: Formation = form_each
        self.project_out: Callable[[Attention, Tensor], Tensor] = project_out
        self.attend: AttentionFunction = sdpa
        self.split: str | None = None
        self.query_chunk = DEFAULT_QUERY_CHUNK

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        rope: RopeTable | None = None,
        key_rope: RopeTable | None = None,
        skip: Skip | None = None,
    ) -> Tensor:
        """Attend from x (B, T, query_width) to `context` (B, S, context_width), or to x itself.

        Args:
            mask: additive, (B, 1, 1 or T, S).
            rope: table of the queries, and of the keys unless `key_rope` is given.
            skip: replaces the result by the values, where it says so (self-attention only).
        """
        if skip is not None and skip.keep is None:
            result = self.heads_of(self.to_v(x if context is None else context))
            gates = None if self.to_gate_logits is None else self.to_gate_logits(x)
        else:
            key_rope = rope if key_rope is None else key_rope
            query, key, value, gates = self.form(self, x, context, rope, key_rope)
            result = self._attend(query, key, value, mask)
            if skip is not None:
                result = torch.lerp(value, result, skip.keep.unsqueeze(-1))
        if gates is not None:
            result = result * (2 * torch.sigmoid(gates)).unsqueeze(-1)
        return self.project_out(self, result.flatten(2))

    def heads_of(self, x: Tensor, norm: RMSNorm | None = None, rope: RopeTable | None = None) -> Tensor:
        """A projection (B, T, H*D) -> (B, T, H, D), normed and rotated."""
        x = (x if norm is None else norm(x)).unflatten(-1, (self.heads, -1))
        return x if rope is None else apply_rope(x, rope)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.split == "batch" and query.shape[0] > 1:
            masks = [None] * query.shape[0] if mask is None else mask.expand(query.shape[0], -1, -1, -1).split(1)
            parts = zip(query.split(1), key.split(1), value.split(1), masks)
            return torch.cat([self.attend(*part) for part in parts])
        if self.split == "query" and query.shape[1] > self.query_chunk:
            groups = query.split(self.query_chunk, dim=1)
            masks = [mask] * len(groups)
            if mask is not None and mask.shape[2] > 1:
                masks = mask.split(self.query_chunk, dim=2)
            return torch.cat([self.attend(group, key, value, part) for group, part in zip(groups, masks)], dim=1)
        return self.attend(query, key, value, mask)
