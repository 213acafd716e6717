"""Attached adapters made fast: all layers that read one input multiply as one.

Queries, keys and values of one input are one product. The down matrices of a pass (see `working_copies`) go further:
they are put below the frozen weights of the same input, as the last rows of one matrix, and the weights of the gates,
which read that input too, lie between. One product gives everything, and one gives all of the input's gradient.
Quantised weights are expanded into such a matrix for each product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ltx2_tuner.lora import heads
from ltx2_tuner.lora.layer import LoRAAdapter, LoRALinear
from ltx2_tuner.lora.network import LoRANetwork
from ltx2_tuner.lora.working_copies import AdapterGroup, WorkingCopies
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.attention import Attention, Heads, RMSNorm, project_out
from ltx2_tuner.models.transformer.model import ATTENTION_TARGETS
from ltx2_tuner.models.transformer.rope import RopeTable
from ltx2_tuner.quantization import DenseLinear, FrozenLinear
from ltx2_tuner.quantization.expand import expanded_stack, stacked_linear
from ltx2_tuner.quantization.frozen import product_dtype
from ltx2_tuner.quantization.joint import expanded_alike, first_rows, join, spare_rows
from ltx2_tuner.quantization.products import PartlyTrainedProduct, add_bias, partly_trained_linear

_ALIGNMENT = 128  # bytes of a row: torch's compiler pads others, and then cuBLAS does not add the bias by itself


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
        self.holds_outputs = False  # the product with the stack gives the layers' outputs, too
        self.forms_heads = heads.available()  # by a kernel, where it suits; see `heads`
        if stacks and self.group is not None:
            self._stack_up(fixed, dtype)
        if fixed and self.base is None and not self.expands and len(self.bases) > 1:
            self.base = join(self.bases)

    def _stack_up(self, fixed: bool, dtype: torch.dtype) -> None:
        """Put the down matrices below the frozen weights, below what these are expanded to, or at least below gates."""
        gates = [] if self.gates is None else [self.gates]
        alike = len({layer.bias is None for layer in (*self.bases, *gates)}) == 1
        if not alike or any(not _is_dense(layer, dtype) for layer in gates):
            return
        self.expands = expanded_alike(self.bases) and self.bases[0].compute_dtype == dtype
        holds_bases = fixed and all(_is_dense(base, dtype) for base in self.bases)
        if not (self.expands or holds_bases or gates):
            return
        first = self.group.adapters[0]
        count = len(self.group.adapters) * first.rank
        together = [*self.bases, *gates] if self.expands or holds_bases else gates
        unused = -(count + sum(layer.out_features for layer in together)) % (_ALIGNMENT // dtype.itemsize)
        layers = [*self.bases, *gates] if holds_bases else gates
        if layers:
            stack = join(layers, spare=unused + count)
        else:
            stack = spare_rows(unused + count, self.bases[0], dtype, first.lora_down.weight.device)
        if stack is None:
            self.expands = False
            return
        self.stack, self.stacked, self.unused = stack, layers, unused
        self.holds_outputs = self.expands or holds_bases
        self.group.rows = stack.weight.data[-count:]
        if holds_bases:
            self.base = first_rows(stack, sum(base.out_features for base in self.bases))

    def __call__(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """x (..., in) -> the output (..., out) of each layer, and of the gates."""
        layers = [getattr(self.parent, name) for name in self.names]
        adds_group = self._adds_group(layers)
        if adds_group and self._stacks(x):
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

    def formed(
        self, attention: Attention, x: Tensor, norms: Sequence[RMSNorm], rope: RopeTable | None
    ) -> tuple[list[Tensor], Tensor | None] | None:
        """The outputs as heads (B, T, H, D), the first ones normed and rotated, and the gates, by one kernel.

        None where it does not apply: it is for compiled code on CUDA.
        """
        if not (self.forms_heads and torch.compiler.is_compiling()):
            return None
        if not (self._adds_group([getattr(self.parent, name) for name in self.names]) and self._stacks(x)):
            return None
        up, whole = self.group.copies.up, self.holds_outputs
        if not heads.suits(x, up.shape[1], attention.heads, rope):
            return None
        base = self.base if self.base is not None else self.bases[0]
        joined = isinstance(base, FrozenLinear) and base.out_features == up.shape[0] * up.shape[1]
        if not (whole or joined):
            return None
        x = x.to(self.stack.weight.dtype)
        together, bias = self._together(x, self.group.copies.down)
        product, lower = (together, None) if whole else (base.compiled(x), together)
        weights = [norm.weight.to(x.dtype) for norm in norms]
        cos, sin = (None, None) if rope is None else rope
        gates = 0 if self.gates is None else self.gates.out_features
        formed = heads.form_heads(
            product, lower, bias if whole else base.bias, None if whole else bias, up, weights, cos, sin,
            attention.heads, gates, self.group.strengths[0], norms[0].eps,
        )  # fmt: skip
        outputs = [part.unflatten(-1, (attention.heads, -1)) for part in formed[: up.shape[0]]]
        return outputs, formed[3] if gates else None

    def _stacks(self, x: Tensor) -> bool:
        """Whether a pass that adds the group multiplies with its matrices as rows of one matrix."""
        return self.group.copies.stacked and product_dtype(x) == self.stack.weight.dtype

    def _stacked(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The same with the group's matrices and the gates as rows of one matrix."""
        down = self.group.copies.down
        together = add_bias(*self._together(x, down))
        layers = [*self.bases, *self.stacked] if self.expands else self.stacked
        sizes = [layer.out_features for layer in layers] + ([self.unused] if self.unused else [])
        # No starred target: under torch 2.11's compiler that is a tuple.
        parts = together.split([*sizes, down.shape[0]], dim=-1)
        outputs = parts[: len(self.bases)] if self.holds_outputs else self._frozen(x)
        gates = None if self.gates is None else parts[len(layers) - 1]
        # A copy of a few columns: what the backward pass keeps of them would keep all the others, too.
        hidden = parts[-1].clone(memory_format=torch.contiguous_format)
        return self.group.add_up(hidden, outputs), gates

    def _together(self, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (..., in) times all rows -> (..., all outputs), and the bias still to be added, if there is one.

        `down` gets the gradient of the last rows.
        """
        rows, bias = self.stack.weight, self.stack.bias
        compiling = torch.compiler.is_compiling()
        if not self.expands:
            if not compiling:
                return PartlyTrainedProduct.apply(x, rows, bias, down), None
            return partly_trained_linear(x, rows, down), bias
        codes, scales = [base.codes for base in self.bases], [base.scale for base in self.bases]
        if bias is not None:
            bias = torch.cat([*(base.bias for base in self.bases), bias]).to(x.dtype)
        stored = self.bases[0].stored
        if not compiling:
            return stacked_linear(x, codes, scales, rows, down, bias, stored), None
        if not self.bases[0].shown:
            return stacked_linear(x, codes, scales, rows, down, None, stored), bias
        return partly_trained_linear(x, expanded_stack(codes, scales, rows, stored), down), bias

    def _adds_group(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the group's adapters are the ones in place, and act alike."""
        group = self.group
        if group is None or group.copies is None or any(s != group.strengths[0] for s in group.strengths):
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
        attention.form = self.form
        attention.project_out = project_out if self.out.stack is None else self.project_out

    @property
    def groups(self) -> list[AdapterGroup]:
        """Adapters that multiply together or with a frozen weight."""
        joints = [joint for joint in (self.of_x, self.of_context, self.out) if joint is not None]
        return [joint.group for joint in joints if joint.group is not None and _joins(joint)]

    def form(
        self,
        attention: Attention,
        x: Tensor,
        context: Tensor | None,
        rope: RopeTable | None,
        key_rope: RopeTable | None,
    ) -> Heads:
        """See `Attention.form`."""
        norms = attention.q_norm, attention.k_norm
        if self.of_context is None:
            (query, key, value), gates = self._heads(attention, self.of_x, x, norms, rope)
            return query, key, value, gates
        (key, value), _ = self._heads(attention, self.of_context, context, norms[1:], key_rope)
        (query,), gates = self._heads(attention, self.of_x, x, norms[:1], rope)
        return query, key, value, gates

    @staticmethod
    def _heads(
        attention: Attention, joint: JointLinear, x: Tensor, norms: Sequence[RMSNorm], rope: RopeTable | None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """What reads one input: heads, the first ones normed and rotated, and the gates."""
        formed = joint.formed(attention, x, norms, rope)
        if formed is not None:
            return formed
        if _joins(joint):
            outputs, gates = joint(x)
        else:
            outputs = [getattr(joint.parent, name)(x) for name in joint.names]
            gates = None if joint.gates is None else joint.gates(x)
        first = [attention.heads_of(out, norm, rope) for out, norm in zip(outputs, norms)]
        return [*first, *(attention.heads_of(out) for out in outputs[len(norms) :])], gates

    def project_out(self, attention: Attention, x: Tensor) -> Tensor:
        """See `Attention.project_out`."""
        (out,), _ = self.out(x)
        return out


def _is_dense(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is a layer whose rows can lie beside those of adapters."""
    return type(layer) in (nn.Linear, DenseLinear) and layer.weight.dtype == dtype


def _joins(joint: JointLinear) -> bool:
    """Whether there is anything for it to join."""
    return len(joint.names) > 1 or joint.stack is not None


def join_adapters(
    model: LTXTransformer, network: LoRANetwork, dtype: torch.dtype, *, stays: bool = True, streamed: bool = False
) -> WorkingCopies:
    """Make an attached network fast: joint projections in all attentions, working copies of its adapters.

    The model's `before_blocks` makes the copies from now on. Call it when the weights are where they will stay, and
    again when they are elsewhere: copies made before are of no use then.

    Args:
        dtype: what adapters multiply in.
        stays: False where the whole model leaves the device at times: only adapters are joined.
        streamed: the matrices of some blocks come and go.
    """
    if isinstance(model.before_blocks, WorkingCopies):  # else all weights joined before would live beside the new ones
        model.before_blocks.let_go()
        model.before_blocks = None
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
