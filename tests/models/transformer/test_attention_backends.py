"""torch's attention in parts: queries of one sample as several, where keys are few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltx2_tuner.models.transformer.attention_backends import sdpa


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v, (B, T, H, D)."""
    scores = torch.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)


@pytest.mark.parametrize(
    ("queries", "keys"), [(2688, 49), (1024, 64), (1025, 65), (1027, 9), (1536, 121), (1100, 250), (1024, 600), (96, 4)]
)
def test_many_queries_of_few_keys_are_attention_as_written_out(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    shapes = (2, queries, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8), (2, queries, 3, 8)
    *leaves, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found, wanted = sdpa(*leaves), written_out(*leaves)
    torch.testing.assert_close(found, wanted)
    pairs = zip(torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(wanted, leaves, gradient))
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_a_mask_holds_for_the_queries_it_is_given_for() -> None:
    query, key = torch.randn(1, 1024, 2, 8), torch.randn(1, 40, 2, 8)
    mask = torch.zeros(1, 1, 1024, 40)
    mask[:, :, :512, 20:] = -torch.inf
    found = sdpa(query, key, key, mask)
    torch.testing.assert_close(found[:, :512], written_out(query[:, :512], key[:, :20], key[:, :20]))
    torch.testing.assert_close(found[:, 512:], written_out(query[:, 512:], key, key))
