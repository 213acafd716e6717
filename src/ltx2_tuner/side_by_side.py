"""Many small tensors side by side in one flat tensor: a copy or a reduction of all of them is one operation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor


def flat_of(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The flat tensor whose consecutive pieces are these tensors; None where there is none of this dtype."""
    address = pieces[0].data_ptr()
    for piece in pieces:
        if piece.dtype != dtype or piece.data_ptr() != address or not piece.is_contiguous():
            return None
        address += piece.numel() * dtype.itemsize
    storage = pieces[0].untyped_storage()
    if address > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None
    size = sum(piece.numel() for piece in pieces)
    return pieces[0].new_empty(0).set_(storage, pieces[0].storage_offset(), (size,))


def views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Consecutive pieces of a flat tensor that autograd takes for tensors of their own."""
    result, offset = [], flat.storage_offset()
    for shape in shapes:
        size = torch.Size(shape)
        result.append(flat.new_empty(0).set_(flat.untyped_storage(), offset, size))
        offset += size.numel()
    return result


def empty(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """New tensors of these shapes, side by side."""
    return views(torch.empty(sum(torch.Size(shape).numel() for shape in shapes), dtype=dtype, device=device), shapes)


def runs(*columns: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The rows of a table as ranges (first, end) in which the tensors of every column lie side by side."""
    count = len(columns[0])
    together = np.ones(max(count - 1, 0), dtype=bool)
    ends = []
    for column in columns:
        begin = np.array([tensor.data_ptr() for tensor in column], dtype=np.int64)
        ends.append(begin + np.array([tensor.nbytes for tensor in column], dtype=np.int64))
        together &= ends[-1][:-1] == begin[1:]
        if not all(map(Tensor.is_contiguous, column)):
            whole = np.array([tensor.is_contiguous() for tensor in column])
            together &= whole[:-1] & whole[1:]
        if len(set(map(attrgetter("dtype"), column))) > 1:
            together &= np.array([a.dtype == b.dtype for a, b in pairwise(column)], dtype=bool)
        if not together.any():
            return [(row, row + 1) for row in range(count)]
    found, first = [], 0
    breaks = iter([*(np.flatnonzero(~together) + 1).tolist(), count])
    end = next(breaks)
    while first < count:
        stop = end
        if stop - first > 1:  # separate storages may be neighbours by chance
            for column, stops in zip(columns, ends):
                storage = column[first].untyped_storage()
                room = np.searchsorted(stops[first:stop], storage.data_ptr() + storage.nbytes(), side="right")
                stop = first + int(room)
        found.append((first, stop))
        first = stop
        end = next(breaks, count) if first == end else end
    return found


def in_one_memory(neighbours: Sequence[Tensor]) -> bool:
    """Whether tensors whose addresses are those of neighbours are pieces of one memory, and not so by chance."""
    if len(neighbours) == 1:
        return True
    storage, last = neighbours[0].untyped_storage(), neighbours[-1]
    return last.data_ptr() + last.nbytes <= storage.data_ptr() + storage.nbytes()


def joined(neighbours: Sequence[Tensor]) -> Tensor:
    """Tensors that lie side by side as one flat tensor; a single one as it is."""
    first, last = neighbours[0], neighbours[-1]
    if first is last:
        return first
    size = (last.data_ptr() + last.nbytes - first.data_ptr()) // first.itemsize
    return first.new_empty(0).set_(first.untyped_storage(), first.storage_offset(), (size,))
