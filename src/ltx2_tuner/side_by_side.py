"""Many small tensors side by side in one flat tensor: a copy or a reduction of all of them is one operation."""

from __future__ import annotations

from collections.abc import Sequence

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
