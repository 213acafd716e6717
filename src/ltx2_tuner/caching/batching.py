"""Which items are encoded together: decided by the whole member list, never by what happens to be missing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def lay_out(items: Iterable[T], size: int, key: Callable[[T], Hashable]) -> list[tuple[T, ...]]:
    """Batches of up to `size` items with equal keys, in the order in which they fill up; partly filled ones last."""
    open_batches: dict[Hashable, list[T]] = {}
    batches = []
    for item in items:
        batch = open_batches.setdefault(key(item), [])
        batch.append(item)
        if len(batch) == size:
            batches.append(tuple(batch))
            del open_batches[key(item)]
    return batches + [tuple(batch) for batch in open_batches.values()]
