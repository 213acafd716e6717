"""Fast training of attached adapters: their matrices are cast once a pass, and those of one input multiply together.

Adapters keep float32 masters. Cast at each use, they cost a kernel per matrix in forward and another in backward;
three adapters on q, k and v of one input cost three products where one does. So each pass makes one flat copy of all
masters in the compute dtype, laid out such that the matrices of a group of adapters are neighbours. Masters that have
the compute dtype are laid out like this themselves, and read without a copy.

The down matrices of a pass go further: they are put below the frozen weights of the same input, as the last rows of one
matrix, and the weights of the gates, which read that input too, lie between. One product gives everything, and one
gives all of the input's gradient. Quantised weights are expanded into such a matrix for each product.

T tokens, n adapters of a group, r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2_tuner.lora.layer import LoRAAdapter, LoRALinear, multiplying_in
from ltx2_tuner.lora.network import LoRANetwork
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.attention import Attention
from ltx2_tuner.models.transformer.model import ATTENTION_TARGETS
from ltx2_tuner.quantization import DenseLinear, FrozenLinear
from ltx2_tuner.quantization.expand import stacked_linear
from ltx2_tuner.quantization.joint import expanded_alike, first_rows, join, spare_rows
from ltx2_tuner.quantization.operators import operator
from ltx2_tuner.quantization.products import PartlyTrainedProduct, partly_trained_linear
from ltx2_tuner.side_by_side import empty, flat_of, views

_ALIGNMENT = 128  # bytes of a row: torch's compiler pads others, and then cuBLAS does not add the bias by itself


@dataclass(eq=False)
class AdapterGroup:
    """Adapters (one or more) of equal shape whose layers read the same input.

    down (n * r, in) and up (n, out, r) are the working copies of the current pass.

    Attributes:
        rows: below a frozen weight, where `down` lies in passes with gradients.
        stacked: whether it lies there in the current pass.
    """

    adapters: tuple[LoRAAdapter, ...]
    rows: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    stacked: bool = False

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

    def use(self, down: Tensor | None, up: Tensor | None) -> None:
        self.down, self.up = down, up
        self.stacked = down is not None and self.rows is not None and down.data_ptr() == self.rows.data_ptr()
        # One by one the adapters multiply only where they are alone or where their strengths differ.
        if down is None:
            matrices = [None] * len(self.adapters)
        elif len(self.adapters) > 1:
            matrices = zip(down.chunk(len(self.adapters)), up.unbind())
        else:
            matrices = [(down, up.flatten(0, 1))]
        for adapter, copies in zip(self.adapters, matrices):
            adapter.copies = copies

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The adapters of x (..., in) added to the outputs (..., out) of their layers."""
        with multiplying_in(self.down.dtype, x.device.type):
            hidden = F.linear(x.to(self.down.dtype).reshape(-1, x.shape[-1]), self.down)
        return self.add_up(hidden, outputs)

    def add_up(self, hidden: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same, given the products (..., n * r) of x and `down`."""
        strength, count = self.strengths[0], len(self.adapters)
        if strength != 1.0:
            hidden = hidden * strength
        hidden = hidden.reshape(-1, hidden.shape[-1]).unflatten(1, (count, -1)).transpose(0, 1)  # (n, T, r)
        with multiplying_in(self.up.dtype, hidden.device.type):
            multiply = _up_products if torch.compiler.is_compiling() else _UpProducts.apply
            added = multiply(hidden, self.up)  # (n, T, out)
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


class JointLinear:
    """Layers of a module that read the same input, as one call.

    They are looked up at each call: adapters may come and go between calls.

    Args:
        fixed: whether the frozen weights stay where they are; else each multiplies by itself, unless it is expanded.
        stacks: whether gates and down matrices may be put below each other.
        dtype: what adapters multiply in.
        gates: a layer that reads the same input, if there is one.
    """

    def __init__(
        self,
        parent: nn.Module,
        names: Sequence[str],
        *,
        fixed: bool,
        stacks: bool,
        dtype: torch.dtype,
        gates: nn.Module | None = None,
    ) -> None:
        self.parent, self.names, self.gates = parent, tuple(names), gates
        layers = [getattr(parent, name) for name in names]
        self.bases = [_base(layer) for layer in layers]
        adapters = [layer.adapter for layer in layers if isinstance(layer, LoRALinear) and layer.base is _base(layer)]
        self.group = AdapterGroup(tuple(adapters)) if len(adapters) == len(layers) and _alike(adapters) else None
        self.base: FrozenLinear | None = None
        self.stack: DenseLinear | None = None  # of what is in `stacked`, some unused rows, and the down matrices
        self.stacked: list[nn.Module] = []
        self.unused = 0
        self.expands = False  # the stack comes below the frozen weights whenever these are expanded
        if stacks and self.group is not None:
            self._stack_up(fixed, dtype)
        if fixed and self.base is None and not self.expands and len(self.bases) > 1:
            self.base = join(self.bases)

    def _stack_up(self, fixed: bool, dtype: torch.dtype) -> None:
        gates = [] if self.gates is None else [self.gates]
        if any(not _is_dense(layer, dtype) for layer in gates):
            return
        alike = len({layer.bias is None for layer in (*self.bases, *gates)}) == 1
        self.expands = alike and expanded_alike(self.bases) and self.bases[0].compute_dtype == dtype
        holds_bases = fixed and all(_is_dense(base, dtype) for base in self.bases)
        if not (self.expands or holds_bases or gates):
            return
        layers = [*self.bases, *gates] if holds_bases else gates
        first = self.group.adapters[0]
        count = len(self.group.adapters) * first.rank
        outputs = count + sum(layer.out_features for layer in gates)
        outputs += sum(base.out_features for base in self.bases) if self.expands or holds_bases else 0
        unused = -outputs % (_ALIGNMENT // dtype.itemsize)
        if layers:
            stack = join(layers, spare=unused + count)
        else:
            stack = spare_rows(unused + count, self.bases[0], dtype, first.lora_down.weight.device)
        if stack is None:
            self.expands = False
            return
        self.stack, self.stacked, self.unused = stack, layers, unused
        self.group.rows = stack.weight.data[-count:]
        if holds_bases:
            self.base = first_rows(stack, sum(base.out_features for base in self.bases))

    def __call__(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """x (..., in) -> the output (..., out) of each layer, and of the gates."""
        layers = [getattr(self.parent, name) for name in self.names]
        adds_group = self._adds_group(layers)
        if adds_group and self.group.stacked and _multiplies_in(x) == self.stack.weight.dtype:
            return self._stacked(x.to(self.stack.weight.dtype))
        gates = None if self.gates is None else self.gates(x)
        outputs = self._frozen(x)
        if adds_group:
            return self.group.add(x, outputs), gates
        return tuple(_add_adapters(layer, x, out) for layer, out in zip(layers, outputs)), gates

    def _frozen(self, x: Tensor) -> Sequence[Tensor]:
        if self.base is None:
            return [base(x) for base in self.bases]
        return self.base(x).split([base.out_features for base in self.bases], dim=-1)

    def _stacked(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The same with the group's matrices and the gates as rows of one matrix."""
        rows, bias, down = self.stack.weight, self.stack.bias, self.group.down
        if self.expands:
            codes, scales = [base.codes for base in self.bases], [base.scale for base in self.bases]
            biases = [] if bias is None else [base.bias for base in self.bases]
            together = stacked_linear(x, codes, scales, biases, rows, bias, down, self.bases[0].stored)
        else:
            multiply = partly_trained_linear if torch.compiler.is_compiling() else PartlyTrainedProduct.apply
            together = multiply(x, rows, bias, down)
        layers = [*self.bases, *self.stacked] if self.expands else self.stacked
        sizes = [layer.out_features for layer in layers] + ([self.unused] if self.unused else [])
        # No starred target: under torch 2.11's compiler that is a tuple.
        parts = together.split([*sizes, down.shape[0]], dim=-1)
        outputs = parts[: len(self.bases)] if layers[0] is self.bases[0] else self._frozen(x)
        gates = None if self.gates is None else parts[len(layers) - 1]
        # A copy of a few columns: what the backward pass keeps of them would keep all the others, too.
        hidden = parts[-1].clone(memory_format=torch.contiguous_format)
        return self.group.add_up(hidden, outputs), gates

    def _adds_group(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the group's adapters are the ones in place, and act alike."""
        group = self.group
        if group is None or group.down is None or any(s != group.strengths[0] for s in group.strengths):
            return False
        if group.strengths[0] == 0.0:
            return False
        return all(
            isinstance(layer, LoRALinear) and layer.adapter is adapter and layer.base is base
            for layer, adapter, base in zip(layers, group.adapters, self.bases)
        )


class JointAttention:
    """The projections of an attention with the layers of one input as one.

    q, k and v of self-attention, k and v of another; q and the output by themselves where something is stacked.
    """

    def __init__(
        self, attention: Attention, reads_itself: bool, *, fixed: bool, stacks: bool, dtype: torch.dtype
    ) -> None:
        how = {"fixed": fixed, "stacks": stacks, "dtype": dtype}
        names = ("to_q", "to_k", "to_v") if reads_itself else ("to_q",)
        self.of_x = JointLinear(attention, names, gates=attention.to_gate_logits, **how)
        self.of_context = None if reads_itself else JointLinear(attention, ("to_k", "to_v"), **how)
        self.out = JointLinear(attention.to_out, ("0",), **how)
        attention.project = self.project
        if self.out.stack is not None:
            attention.project_out = self.project_out

    @property
    def groups(self) -> list[AdapterGroup]:
        """Adapters that multiply together or with a frozen weight."""
        joints = [joint for joint in (self.of_x, self.of_context, self.out) if joint is not None]
        return [joint.group for joint in joints if joint.group is not None and _joins(joint)]

    def project(
        self, attention: Attention, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Attention.project`."""
        if self.of_context is None:
            outputs, gates = self.of_x(x)
            return (*outputs, gates)
        keys_values, _ = self.of_context(context)
        if _joins(self.of_x):
            (query,), gates = self.of_x(x)
        else:
            query, gates = attention.to_q(x), None if self.of_x.gates is None else self.of_x.gates(x)
        return (query, *keys_values, gates)

    def project_out(self, attention: Attention, x: Tensor) -> Tensor:
        """See `Attention.project_out`."""
        (out,), _ = self.out(x)
        return out


def _multiplies_in(x: Tensor) -> torch.dtype:
    """The dtype of a product of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _is_dense(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is a layer whose rows can lie beside those of adapters."""
    return type(layer) in (nn.Linear, DenseLinear) and layer.weight.dtype == dtype


def _joins(joint: JointLinear) -> bool:
    """Whether there is anything for it to join."""
    return len(joint.names) > 1 or joint.stack is not None


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
        below = [p for p in self.pieces if p.rows is not None and (with_gradients or p.settled)]
        apart = [piece for piece in self.pieces if piece not in below]
        flat = self._flat([master for piece in apart for master in piece.masters], settle=with_gradients)
        strays = [piece for piece in below if not piece.settled]
        places = [part for piece in strays for part in piece.rows.chunk(len(piece.masters))]
        masters = [master for piece in strays for master in piece.masters]
        if strays:
            torch._foreach_copy_(places, masters)
            _settle(masters, places)
        found = dict(zip(map(id, apart), views(flat, [piece.shape for piece in apart])))
        found |= {id(piece): views(piece.rows, [piece.shape])[0] for piece in below}
        return [found[id(piece)] for piece in self.pieces]

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
                group.use(None, None)

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


def join_adapters(
    model: LTXTransformer, network: LoRANetwork, dtype: torch.dtype, *, stays: bool = True, streamed: bool = False
) -> WorkingCopies:
    """Make an attached network fast: joint projections in all attentions, working copies of its adapters.

    The model's `before_blocks` makes the copies from now on. Call it once, when the weights are where they will stay.

    Args:
        dtype: what adapters multiply in.
        stays: False where the whole model leaves the device at times: only adapters are joined.
        streamed: the matrices of some blocks come and go.
    """
    groups, grouped = [], set()
    for block in model.transformer_blocks:
        for name in ATTENTION_TARGETS["all"]:
            if hasattr(block, name):
                how = {"fixed": stays and not streamed, "stacks": stays, "dtype": dtype}
                joint = JointAttention(getattr(block, name), name in ATTENTION_TARGETS["self"], **how)
                groups += joint.groups
                grouped.update(adapter for group in joint.groups for adapter in group.adapters)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the weights that the joint ones replaced would stay reserved piece by piece
    groups += [AdapterGroup((adapter,)) for _, adapter in network.adapters() if adapter not in grouped]
    copies = WorkingCopies(groups, dtype)
    network.set_compute_dtype(dtype)
    model.before_blocks = copies
    return copies


def _base(layer: nn.Module) -> nn.Module:
    """The frozen layer under any number of adapters."""
    while isinstance(layer, LoRALinear):
        layer = layer.base
    return layer


def _add_adapters(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """What `layer` returns, given the output of its frozen base."""
    if not isinstance(layer, LoRALinear):
        return out
    out = _add_adapters(layer.base, x, out)
    return layer.adapter(x, lambda _: out)


def _alike(adapters: Sequence[LoRAAdapter]) -> bool:
    """Whether one product can stand for those of all adapters."""
    kinds = {(a.in_features, a.out_features, a.rank, a.alpha_value) for a in adapters}
    return len(kinds) == 1 and not any(a.dropout or a.rank_dropout or a.module_dropout for a in adapters)
