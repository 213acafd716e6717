"""One layer in place of several that read the same input: one product, one input gradient, no more memory.

The members keep their modules and names; their tensors become views of the joint layer's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ltx2_tuner.quantization.frozen import DenseLinear, Fp8Linear, FrozenLinear, QuantisedLinear


def join(layers: Sequence[nn.Module], spare: int = 0) -> FrozenLinear | None:
    """The layer (in -> sum of outs) whose outputs are those of `layers`, one after the other.

    With `spare` as many rows of zeros follow, for whatever else multiplies the same input (dense layers only).

    None where that cannot be: another kind than dense or fp8 tensor-core layers, kinds, dtypes or inputs that differ,
    weights that are trained.
    """
    if len({_kind(layer) for layer in layers}) > 1 or _kind(layers[0]) is None:
        return None
    if isinstance(layers[0], Fp8Linear):
        return None if spare else _join_fp8(layers)
    first = layers[0].weight.data
    weight = torch.cat([*(layer.weight.data for layer in layers), first.new_zeros(spare, first.shape[1])])
    joint = DenseLinear(weight, _join_biases(layers, spare))
    for layer, rows in zip(layers, weight.split([layer.out_features for layer in layers] + [spare])):
        layer.weight.data = rows
    return joint


def expanded_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether `expand.stacked_linear` takes these layers: stored in one way, expanded for each product."""
    if not all(isinstance(layer, QuantisedLinear) for layer in layers):
        return False
    if any(layer.scale is None or layer.column_scale is not None for layer in layers):
        return False
    if any(isinstance(layer, Fp8Linear) and layer.tensor_cores for layer in layers):
        return False
    return len({(layer.stored, layer.in_features, layer.compute_dtype, layer.bias is None) for layer in layers}) == 1


def spare_rows(count: int, like: nn.Module, dtype: torch.dtype, device: torch.device) -> DenseLinear:
    """A layer of zeros with as many outputs, another's inputs, and a bias where that has one."""
    bias = None if like.bias is None else torch.zeros(count, dtype=dtype, device=device)
    return DenseLinear(torch.zeros(count, like.in_features, dtype=dtype, device=device), bias)


def first_rows(layer: DenseLinear, count: int) -> DenseLinear:
    """The layer of the first `count` outputs of another, on the same memory."""
    return DenseLinear(layer.weight.data[:count], None if layer.bias is None else layer.bias.data[:count])


def _kind(layer: nn.Module) -> tuple | None:
    """What has to agree among layers that are joined, or None."""
    if any(parameter.requires_grad or parameter.is_meta for parameter in layer.parameters()):
        return None
    shared = (layer.in_features, layer.bias is None, None if layer.bias is None else layer.bias.dtype)
    if type(layer) in (nn.Linear, DenseLinear):
        return (*shared, DenseLinear, layer.weight.dtype, layer.weight.device)
    if isinstance(layer, Fp8Linear) and layer.tensor_cores:
        kept = layer.transposed is not None
        return (*shared, Fp8Linear, layer.codes_dtype, layer.compute_dtype, kept, layer.codes.device)
    return None


def _join_biases(layers: Sequence[nn.Module], spare: int = 0) -> Tensor | None:
    if layers[0].bias is None:
        return None
    return torch.cat([*(layer.bias.data for layer in layers), layers[0].bias.new_zeros(spare)])


def _join_fp8(layers: Sequence[Fp8Linear]) -> Fp8Linear:
    first = layers[0]
    codes = torch.cat([layer.codes for layer in layers])
    scale = torch.cat([layer.scale for layer in layers])
    keep_transposed = first.transposed is not None
    joint = Fp8Linear(
        codes.view(first.codes_dtype), scale, _join_biases(layers), first.compute_dtype, True, keep_transposed
    )
    start = 0
    for layer in layers:
        end = start + layer.out_features
        tensors = {"codes": joint.codes[start:end], "scale": joint.scale[start:end]}
        if keep_transposed:
            tensors["transposed"] = joint.transposed[:, start:end]
        layer.rebind(tensors)
        start = end
    return joint
