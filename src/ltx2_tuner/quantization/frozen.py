"""Frozen linear layers: one interface, a member for each precision that weights are stored in.

A frozen weight needs no gradient, so nothing of the input is kept for backward; the input gradient needs the weight
alone, which is expanded again from its stored form. The layer, not its tensors, is what the graph holds on to: a
block store may put a layer's tensors elsewhere between forward and backward, as long as they are back in time.

Every member is an `nn.Linear` for whoever asks (adapters, LyCORIS); `weight` is the dense matrix, which quantised
members make at each access.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.quantization import products
from ltx2_tuner.quantization.expand import NF4, expand, expanded, stored_linear, stored_linear_input_gradient
from ltx2_tuner.quantization.nf4 import Nf4Tensor


class FrozenLinear(nn.Linear):
    """A linear layer (in -> out) whose tensors never change.

    Members implement `dense`, `product`, `input_gradient` and `compiled`. All tensors are parameters or buffers of
    the module; `storage` lists them.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`; quantised members make a new tensor."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without autograd."""
        raise NotImplementedError

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the output (..., out) -> gradient of the input (..., in)."""
        raise NotImplementedError

    def compiled(self, x: Tensor) -> Tensor:
        """`product` without the bias, with its gradient, in operators that suit a compiler."""
        raise NotImplementedError

    def storage(self) -> dict[str, Tensor]:
        """All tensors by their name in the module: what moves when the layer moves."""
        tensors = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def rebind(self, tensors: Mapping[str, Tensor]) -> None:
        """Use these tensors (same names, dtypes and shapes as `storage`) from now on; nothing is copied.

        The parameters and buffers stay the objects they are: what a compiled pass saved of them for its backward pass
        follows. A view would not, so it is replaced.
        """
        for name, tensor in tensors.items():
            held = self._parameters[name] if name in self._parameters else self._buffers[name]
            if held._is_view():
                held = self._buffers[name] = tensor.new_empty(0)
            held.data = tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        x = x.to(product_dtype(x))
        if torch.compiler.is_compiling():
            return products.add_bias(self.compiled(x), self.bias)
        return _FrozenProduct.apply(x, self)

    def _bias_for(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Move between devices, but keep the dtypes of scales: `module.to(dtype)` must not round them."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(function, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class DenseLinear(FrozenLinear):
    """Weights in bf16, fp16 or fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, weight.dtype)
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def product(self, x: Tensor) -> Tensor:
        return products.dense_product(x, self.weight, self._bias_for(x))

    def input_gradient(self, gradient: Tensor) -> Tensor:
        return products.dense_input_gradient(gradient, self.weight)

    def compiled(self, x: Tensor) -> Tensor:
        return products.dense_linear(x, self.weight)


class QuantisedLinear(FrozenLinear):
    """Weights as bytes.

    Args:
        codes: uint8, (out, in) for fp8, (out, in / 2) for nf4.
        scale, column_scale, stored: as `expand` takes them.

    Attributes:
        shown: whether compiled code sees the dense matrix; right only where a compiler may keep nothing of a pass.
    """

    shown = False

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        stored: str,
        column_scale: Tensor | None = None,
    ) -> None:
        rows, columns = codes.shape
        super().__init__(2 * columns if stored == NF4 else columns, rows, bias, dtype)
        self.stored = stored
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("column_scale", column_scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in) in the compute dtype, made anew at each access."""
        return self.dense(self.compute_dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return expand(self.codes, self.scale, self.column_scale, self.stored, dtype)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype), self._bias_for(x))

    def input_gradient(self, gradient: Tensor) -> Tensor:
        return stored_linear_input_gradient(gradient, self.codes, self.scale, self.column_scale, self.stored)

    def compiled(self, x: Tensor) -> Tensor:
        if not self.shown:
            return stored_linear(x, self.codes, self.scale, self.column_scale, self.stored)
        return products.dense_linear(x, expanded(self.codes, self.scale, self.column_scale, self.stored, x.dtype))


class Fp8Linear(QuantisedLinear):
    """Weights in fp8 with an optional scale; products in the input's dtype, or on the fp8 tensor cores.

    Args:
        codes: (out, in) in an fp8 dtype.
        scale: None or of shape [], [1], (out, 1), (out, in / 64, 1).
        dtype: what `weight` is in.
        tensor_cores: multiply in fp8, forward and input gradient, where the shape and the scale allow it.
        keep_transposed: hold the transposed codes too, which the input gradient needs: faster, twice the memory.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        tensor_cores: bool = False,
        keep_transposed: bool = False,
    ) -> None:
        rows, columns = codes.shape
        # The cores multiply tiles of 16, and the scale of a block of inputs cannot be taken out of a row's sum.
        suited = rows % 16 == columns % 16 == 0 and (scale is None or scale.dim() < 3)
        tensor_cores = tensor_cores and suited
        if tensor_cores:
            scale = torch.ones(1, device=codes.device) if scale is None else scale
            scale = scale.float().reshape(-1, 1).expand(rows, 1).contiguous()
        # Kept as bytes: a cast of the module to another dtype must not touch them.
        super().__init__(codes.contiguous().view(torch.uint8), scale, bias, dtype, str(codes.dtype))
        self.codes_dtype = codes.dtype
        self.tensor_cores = tensor_cores
        self.register_buffer("transposed", self.codes.t().contiguous() if keep_transposed and tensor_cores else None)

    def product(self, x: Tensor) -> Tensor:
        if not self.tensor_cores:
            return super().product(x)
        return products.add_bias(products.fp8_product(x, self.codes, self.scale, self.stored), self.bias)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        if not self.tensor_cores:
            return super().input_gradient(gradient)
        return products.fp8_input_gradient(gradient, self.codes, self.scale, self.transposed, self.stored)

    def compiled(self, x: Tensor) -> Tensor:
        if not self.tensor_cores:
            return super().compiled(x)
        return products.fp8_linear(x, self.codes, self.scale, self.transposed, self.stored)


class Nf4Linear(QuantisedLinear):
    """Weights in NF4.

    Args:
        weight: codes and scales.
        dtype: what `weight` is in.
        column_scale: (in,) factors that the weights were multiplied with before they were quantised (AWQ).
    """

    def __init__(
        self, weight: Nf4Tensor, bias: Tensor | None, dtype: torch.dtype, column_scale: Tensor | None = None
    ) -> None:
        super().__init__(weight.codes, weight.scale, bias, dtype, NF4, column_scale)


class _FrozenProduct(torch.autograd.Function):
    """A layer's product with the gradient of its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        product = layer.product(x)
        # F.linear returns a view, which autograd would not let an adapter add to in place.
        return torch.ops.aten._unsafe_view(product, product.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(gradient), None


def product_dtype(x: Tensor) -> torch.dtype:
    """What x multiplies in: autocast's dtype, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
