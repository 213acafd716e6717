"""What a training pass reads for the matrices of adapters: copies in the compute dtype, laid out to multiply together.

Adapters keep float32 masters. Cast at each use, they cost a kernel per matrix in forward and another in backward;
three adapters on q, k and v of one input cost three products where one does. So each pass makes one flat copy of all
masters in the compute dtype, laid out such that the matrices of a group of adapters are neighbours. Masters that have
the compute dtype are laid out like this themselves, and read without a copy.

T tokens, n adapters of a group, r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2_tuner.lora.layer import LoRAAdapter, multiplying_in
from ltx2_tuner.quantization.operators import operator
from ltx2_tuner.side_by_side import empty, flat_of, views


class PassCopies(NamedTuple):
    """What passes of one kind read for a group of n adapters. stacked: `down` lies below a frozen weight."""

    down: Tensor  # (n * r, in)
    up: Tensor  # (n, out, r)
    stacked: bool


@dataclass(eq=False)
class AdapterGroup:
    """Adapters (one or more) of equal shape whose layers read the same input.

    Passes with gradients have working copies of their own: one without may come between another's forward and backward
    pass, which reads its copies again where it recomputes.

    Attributes:
        rows: below a frozen weight, where `down` lies in passes with gradients.
        with_gradients, without: what either kind of pass reads. Compiled code looks at one of them only.
    """

    adapters: tuple[LoRAAdapter, ...]
    rows: Tensor | None = None
    with_gradients: PassCopies | None = None
    without: PassCopies | None = None

    @property
    def copies(self) -> PassCopies | None:
        """Those of the present kind of pass."""
        return self.with_gradients if torch.is_grad_enabled() else self.without

    @property
    def strengths(self) -> tuple[float, ...]:
        """alpha / r times the multiplier of each, 0 for those that are switched off."""
        return tuple(a.multiplier * a.scale if a.is_active else 0.0 for a in self.adapters)

    def pieces(self) -> tuple[_Piece, _Piece]:
        """`down` and `up` as working copies."""
        first, count = self.adapters[0], len(self.adapters)
        downs = _Piece([a.lora_down.weight for a in self.adapters], (count * first.rank, first.in_features), self.rows)
        ups = _Piece([a.lora_up.weight for a in self.adapters], (count, first.out_features, first.rank))
        return downs, ups

    def use(self, down: Tensor, up: Tensor) -> None:
        """Read these in passes of the present kind."""
        stacked = self.rows is not None and down.data_ptr() == self.rows.data_ptr()
        count = len(self.adapters)
        # One by one the adapters multiply only where they are alone or where their strengths differ.
        matrices = zip(down.chunk(count), up.unbind()) if count > 1 else [(down, up.flatten(0, 1))]
        if torch.is_grad_enabled():
            self.forget()
            self.with_gradients = PassCopies(down, up, stacked)
            for adapter, copies in zip(self.adapters, matrices):
                adapter.copies = copies
        else:
            self.without = PassCopies(down, up, stacked)
            for adapter, copies in zip(self.adapters, matrices):
                adapter.copies_without_gradients = copies

    def forget(self) -> None:
        """Let go of all copies."""
        self.with_gradients = self.without = None
        for adapter in self.adapters:
            adapter.copies = adapter.copies_without_gradients = None

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The adapters of x (..., in) added to the outputs (..., out) of their layers."""
        down = self.copies.down
        with multiplying_in(down.dtype, x.device.type):
            hidden = F.linear(x.to(down.dtype).reshape(-1, x.shape[-1]), down)
        return self.add_up(hidden, outputs)

    def add_up(self, hidden: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same, given the products (..., n * r) of x and `down`."""
        up, strength, count = self.copies.up, self.strengths[0], len(self.adapters)
        if strength != 1.0:
            hidden = hidden * strength
        hidden = hidden.reshape(-1, hidden.shape[-1]).unflatten(1, (count, -1)).transpose(0, 1)  # (n, T, r)
        with multiplying_in(up.dtype, hidden.device.type):
            multiply = _up_products if torch.compiler.is_compiling() else _UpProducts.apply
            added = multiply(hidden, up)  # (n, T, out)
        return tuple((out + part.view(out.shape)).to(out.dtype) for out, part in zip(outputs, added.unbind()))


def _multiply_up(hidden: Tensor, up: Tensor) -> Tensor:
    """hidden (n, T, r), up (n, out, r) -> (n, T, out)."""
    return torch.bmm(hidden, up.transpose(1, 2))


class _UpProducts(torch.autograd.Function):
    """`_multiply_up` with the gradient of `up` in the layout of `up`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, up)
        return _multiply_up(hidden, up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, up = ctx.saved_tensors
        return torch.bmm(grad, up), torch.bmm(grad.transpose(1, 2), hidden)


_up_products = operator(
    _multiply_up,
    setup=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=_UpProducts.backward,
)


@dataclass(eq=False)
class _Piece:
    """Masters that a pass reads as one tensor of `shape`; with gradients it lies in `rows`, if that is given."""

    masters: list[nn.Parameter]
    shape: tuple[int, ...]
    rows: Tensor | None = None

    @property
    def settled(self) -> bool:
        """Whether the rows are the masters themselves."""
        flat = flat_of(self.masters, self.rows.dtype)
        return flat is not None and flat.data_ptr() == self.rows.data_ptr()


class WorkingCopies:
    """What passes read for the matrices of a network: all of them in the compute dtype; gradients reach the masters.

    A call gives the groups copies, or views of the masters where these have the compute dtype. Such masters are moved
    to where passes read them: the parameters stay the objects they are, but lie beside each other.
    """

    def __init__(self, groups: Sequence[AdapterGroup], dtype: torch.dtype) -> None:
        self.groups, self.dtype = tuple(groups), dtype
        self.pieces = [piece for group in self.groups for piece in group.pieces()]
        self.masters = [master for piece in self.pieces for master in piece.masters]
        self._leaves: list[Tensor] | None = None
        if self.masters[0].dtype == dtype:
            self._places(with_gradients=True)

    def let_go(self) -> None:
        """Hold nothing any more of the frozen weights that copies lie below; masters that lie there move out."""
        for piece in self.pieces:
            if piece.rows is not None and piece.settled:
                for master in piece.masters:
                    master.data = master.data.clone()
        self.pieces = []
        for group in self.groups:
            group.forget()
            group.rows = None

    def __call__(self) -> None:
        places = self._places(torch.is_grad_enabled())
        if self._leaves is None:
            tensors = _Pieces.apply(places, [len(piece.masters) for piece in self.pieces], *self.masters)
        else:
            tensors = [place.requires_grad_() for place in places]
            self._leaves[:] = tensors
        for group, down, up in zip(self.groups, tensors[::2], tensors[1::2]):
            group.use(down, up)

    @torch.no_grad()
    def _places(self, with_gradients: bool) -> list[Tensor]:
        """What this pass reads for each piece."""
        # Without gradients the parameters may be others' for a while, as those of a teacher: they stay where they are,
        # and what lies below the frozen weights stays too, for passes whose backward pass is still to come.
        apart, strays = [], []
        for piece in self.pieces:
            if piece.rows is None or not (with_gradients or piece.settled):
                apart.append(piece)
            elif not piece.settled:
                strays.append(piece)
        if strays:
            places = [part for piece in strays for part in piece.rows.chunk(len(piece.masters))]
            masters = [master for piece in strays for master in piece.masters]
            torch._foreach_copy_(places, masters)
            _settle(masters, places)
        flat = self._flat([master for piece in apart for master in piece.masters], settle=with_gradients)
        found = dict(zip(map(id, apart), views(flat, [piece.shape for piece in apart])))
        return [found[id(p)] if id(p) in found else views(p.rows, [p.shape])[0] for p in self.pieces]

    def _flat(self, masters: Sequence[nn.Parameter], settle: bool) -> Tensor:
        """Masters side by side in the compute dtype. settle: those of this dtype are to stay in what is made."""
        flat = flat_of(masters, self.dtype)
        if flat is not None:
            return flat
        places = empty([master.shape for master in masters], self.dtype, masters[0].device)
        torch._foreach_copy_(places, masters)
        if settle:
            _settle(masters, places)
        return flat_of(places, self.dtype)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Within the block the copies of a pass are leaves of the graph: these, once the pass has begun.

        Autograd ties a leaf to the stream of the first graph that reaches it, as long as any such graph lives (somebody
        may hold the last loss). Passes that are recorded on a stream of their own need leaves that nobody has used.
        """
        self._leaves = []
        try:
            yield self._leaves
        finally:
            self._leaves = None
            for group in self.groups:
                group.forget()

    def of_masters(self, gradients: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients of the copies, None where a pass reached none -> trained masters and views of their gradients."""
        pairs = []
        for gradient, piece in zip(gradients, self.pieces):
            if gradient is not None:
                shape = piece.masters[0].shape
                pairs += zip(piece.masters, gradient.reshape(len(piece.masters), *shape).unbind())
        return [(master, gradient) for master, gradient in pairs if master.requires_grad]


def _settle(masters: Sequence[nn.Parameter], places: Sequence[Tensor]) -> None:
    """Move masters into their copies, if these have their dtype."""
    if all(master.dtype == place.dtype for master, place in zip(masters, places)):
        for master, place in zip(masters, places):
            master.data = place


class _Pieces(torch.autograd.Function):
    """`places` as functions of the masters, `counts` of them for each, whose values they hold."""

    @staticmethod
    def forward(ctx, places: list[Tensor], counts: list[int], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.counts, ctx.shapes, ctx.dtype = counts, [master.shape for master in masters], masters[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(places)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: dict[int, Tensor] = {}  # index of a master -> its gradient, as far as there is one
        first = 0
        for grad, count in zip(grads, ctx.counts):
            if grad is not None:
                rows = grad.reshape(count, *ctx.shapes[first])
                found |= {first + index: rows[index] for index in range(count)}
            first += count
        if any(grad.dtype != ctx.dtype for grad in found.values()):
            shapes = [ctx.shapes[index] for index in found]
            results = empty(shapes, ctx.dtype, next(iter(found.values())).device)
            torch._foreach_copy_(results, list(found.values()))
            found = dict(zip(found, results))
        return None, None, *(found.get(index) for index in range(first))
