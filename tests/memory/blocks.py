"""A small model with frozen matrices and adapters, and the gradients of a pass through it."""

from __future__ import annotations

import torch
from torch import Tensor

from ltx2_tuner.lora import LoRANetwork, Targets, select_layers
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization import is_quantisable
from ltx2_tuner.quantization.formats import WeightFormat, freeze
from tests.models.transformer import tiny

BLOCKS = 4
FORMATS = {
    "dense": WeightFormat(),
    "fp8": WeightFormat("fp8"),
    "fp8_compute": WeightFormat("fp8", "row", fp8_compute=True, keep_transposed=True),
    "nf4": WeightFormat("nf4", nf4_block_size=16),
}


def adapted(
    weights: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    version: str = "2.3",
    rank: int = 4,
    alpha: float | None = None,
    **changes: object,
) -> tuple[LTXTransformer, LoRANetwork]:
    """Random blocks whose matrices are frozen, and adapters that do something.

    Args:
        weights: a key of FORMATS, or "linear" for the layers that the model is made of.
        version, changes: as `tiny.config` takes them.
    """
    generator = torch.Generator().manual_seed(0)
    model = LTXTransformer(tiny.config(version, **{"num_layers": BLOCKS} | changes)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    model.to(dtype)
    for path, layer in [] if weights == "linear" else list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and is_quantisable(f"{path}.weight", layer.weight.shape):
            parent, _, name = path.rpartition(".")
            bias = None if layer.bias is None else layer.bias.data
            setattr(model.get_submodule(parent), name, freeze(path, layer.weight.data, bias, FORMATS[weights], dtype))
    network = LoRANetwork(select_layers(model, Targets("av", "t2v")), rank, alpha)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    network.set_compute_dtype(dtype)
    network.attach(model)
    return model.to(device).train(), network.train()


class Kept:
    """What autograd keeps that is no weight, within `with kept.counting()`; also of compiled passes.

    A dispatch mode that counts would keep passes from being compiled.
    """

    def __init__(self, model: LTXTransformer) -> None:
        self.sizes: dict[int, int] = {}
        tensors = [*model.parameters(), *model.buffers()]
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in self.weights:
            self.sizes[memory.data_ptr()] = memory.nbytes()
        return tensor


def gradients(
    model: LTXTransformer,
    network: LoRANetwork,
    device: str = "cpu",
    between: bool = False,
    *,
    seed: int = 1,
    passes: int = 1,
) -> list[torch.Tensor]:
    """Both velocities, and the gradient of every adapter matrix.

    Args:
        between: run the model once more, without gradients, before the backward pass.
        seed: of the batch.
        passes: whose gradients are added up.
    """
    network.zero_grad(set_to_none=True)
    streams = {name: tiny.to(modality, device) for name, modality in tiny.inputs(model.config, seed=seed).items()}
    for _ in range(passes):
        outputs = model(**streams)
        if between:
            with torch.no_grad():
                model(**streams)
        sum(output.float().square().mean() for output in outputs).backward()
    return [*(output.detach() for output in outputs), *(p.grad.clone() for p in network.parameters())]
