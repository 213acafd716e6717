"""Fast training of attached adapters: their matrices are cast once a pass, and those of one input multiply together.

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2_tuner.lora.layer import LoRAAdapter, LoRALinear, multiplying_in
from ltx2_tuner.lora.network import LoRANetwork
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.attention import Attention
from ltx2_tuner.models.transformer.model import ATTENTION_TARGETS
from ltx2_tuner.quantization import FrozenLinear
from ltx2_tuner.quantization.joint import join
from ltx2_tuner.quantization.operators import operator
from ltx2_tuner.side_by_side import empty, flat_of, views


@dataclass(eq=False)
class AdapterGroup:
    """Adapters (one or more) of equal shape whose layers read the same input.

    down (n * r, in) and up (n, out, r) are the working copies of the current pass.
    """

    adapters: tuple[LoRAAdapter, ...]
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def strengths(self) -> tuple[float, ...]:
        """alpha / r times the multiplier of each, 0 for those that are switched off."""
        return tuple(a.multiplier * a.scale if a.is_active else 0.0 for a in self.adapters)

    def masters(self) -> list[nn.Parameter]:
        """The down matrices, then the up matrices."""
        return [a.lora_down.weight for a in self.adapters] + [a.lora_up.weight for a in self.adapters]

    def shapes(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Of `down` and `up`."""
        first, count = self.adapters[0], len(self.adapters)
        return (count * first.rank, first.in_features), (count, first.out_features, first.rank)

    def use(self, down: Tensor, up: Tensor) -> None:
        self.down, self.up = down, up
        # One by one the adapters multiply only where they are alone or where their strengths differ.
        matrices = (
            zip(down.chunk(len(self.adapters)), up.unbind()) if len(self.adapters) > 1 else [(down, up.flatten(0, 1))]
        )
        for adapter, copies in zip(self.adapters, matrices):
            adapter.copies = copies

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The adapters of x (..., in) added to the outputs (..., out) of their layers."""
        strength = self.strengths[0]
        count = len(self.adapters)
        with multiplying_in(self.down.dtype, x.device.type):
            hidden = F.linear(x.to(self.down.dtype).reshape(-1, x.shape[-1]), self.down)  # (T, n * r)
            if strength != 1.0:
                hidden = hidden * strength
            hidden = hidden.unflatten(1, (count, -1)).transpose(0, 1)  # (n, T, r)
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

    They are looked up at each call: adapters may come and go between calls. Weights that `stays` says will not move
    are joined, too.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str], stays: bool) -> None:
        self.parent, self.names = parent, tuple(names)
        layers = [getattr(parent, name) for name in names]
        self.bases = [_base(layer) for layer in layers]
        self.base: FrozenLinear | None = join(self.bases) if stays else None
        adapters = [layer.adapter for layer in layers if isinstance(layer, LoRALinear) and layer.base is _base(layer)]
        self.group = AdapterGroup(tuple(adapters)) if len(adapters) == len(layers) and _alike(adapters) else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (..., in) -> the output (..., out) of each layer."""
        layers = [getattr(self.parent, name) for name in self.names]
        if self.base is None:
            outputs = [base(x) for base in self.bases]
        else:
            outputs = self.base(x).split([base.out_features for base in self.bases], dim=-1)
        if self._adds_group(layers):
            return self.group.add(x, outputs)
        return tuple(_add_adapters(layer, x, out) for layer, out in zip(layers, outputs))

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


class JointProjection:
    """`Attention.project` with the layers of one input as one: q, k and v of self-attention, k and v of another."""

    def __init__(self, attention: Attention, reads_itself: bool, stays: bool) -> None:
        self.reads_itself = reads_itself
        self.joint = JointLinear(attention, ("to_q", "to_k", "to_v") if reads_itself else ("to_k", "to_v"), stays)

    def __call__(self, attention: Attention, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.reads_itself:
            return self.joint(x)
        return (attention.to_q(x), *self.joint(context))


class WorkingCopies:
    """What passes read for the matrices of a network: all of them in the compute dtype; gradients reach the masters.

    A call gives the groups copies, or views of the masters where these have the compute dtype. Such masters are moved
    beside each other: the parameters stay the objects they are, but lie in one flat tensor.
    """

    def __init__(self, groups: Sequence[AdapterGroup], dtype: torch.dtype) -> None:
        self.groups, self.dtype = tuple(groups), dtype
        self.masters = [master for group in self.groups for master in group.masters()]
        self.shapes = [shape for group in self.groups for shape in group.shapes()]
        self.counts = [len(group.adapters) for group in self.groups for _ in group.shapes()]
        self._leaves: list[Tensor] | None = None
        if self.masters[0].dtype == dtype:
            self._flat(settle=True)

    def __call__(self) -> None:
        # Without gradients the parameters may be others' for a while, as those of a teacher: they stay where they are.
        flat = self._flat(settle=torch.is_grad_enabled())
        if self._leaves is None:
            tensors = _Pieces.apply(flat, self.shapes, self.counts, *self.masters)
        else:
            tensors = [tensor.requires_grad_() for tensor in views(flat, self.shapes)]
            self._leaves[:] = tensors
        copies = iter(tensors)
        for group in self.groups:
            group.use(next(copies), next(copies))

    @torch.no_grad()
    def _flat(self, settle: bool) -> Tensor:
        """All masters side by side in the compute dtype. settle: those of this dtype are to stay in what is made."""
        flat = flat_of(self.masters, self.dtype)
        if flat is not None:
            return flat
        flat = torch.empty(
            sum(master.numel() for master in self.masters), dtype=self.dtype, device=self.masters[0].device
        )
        places = views(flat, [master.shape for master in self.masters])
        torch._foreach_copy_(places, self.masters)
        if settle and all(master.dtype == self.dtype for master in self.masters):
            for master, place in zip(self.masters, places):
                master.data = place
        return flat

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
                group.down = group.up = None
                for adapter in group.adapters:
                    adapter.copies = None

    def of_masters(self, gradients: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients of the copies, None where a pass reached none -> trained masters and views of their gradients."""
        pairs, first = [], 0
        for gradient, count in zip(gradients, self.counts):
            masters = self.masters[first : first + count]
            if gradient is not None:
                pairs += zip(masters, gradient.reshape(count, *masters[0].shape).unbind())
            first += count
        return [(master, gradient) for master, gradient in pairs if master.requires_grad]


class _Pieces(torch.autograd.Function):
    """For each group of masters (`counts` of them) one tensor of `shapes`, out of `flat`, which holds all masters."""

    @staticmethod
    def forward(
        ctx, flat: Tensor, shapes: list[tuple[int, ...]], counts: list[int], *masters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.shapes, ctx.dtype = counts, [master.shape for master in masters], masters[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(views(flat, shapes))

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
        return None, None, None, *(found.get(index) for index in range(first))


def join_adapters(model: LTXTransformer, network: LoRANetwork, dtype: torch.dtype, stays: bool = True) -> WorkingCopies:
    """Make an attached network fast: joint projections in all attentions, working copies of its adapters.

    The model's `before_blocks` makes the copies from now on. Call it once, when the weights are where they will stay.

    Args:
        dtype: what adapters multiply in.
        stays: False where weights move between host and device: these stay apart, their adapters are joined.
    """
    groups, grouped = [], set()
    for block in model.transformer_blocks:
        for name in ATTENTION_TARGETS["all"]:
            if hasattr(block, name):
                attention = getattr(block, name)
                projection = JointProjection(attention, name in ATTENTION_TARGETS["self"], stays)
                attention.project = projection
                group = projection.joint.group
                if group is not None:
                    groups.append(group)
                    grouped.update(group.adapters)
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
