"""Loading the transformer: tensor by tensor from the file to where it will live, quantised on the way.

The host never holds more than the layer that is under way, besides what is placed there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ltx2_tuner.checkpoint.checkpoint import FP8_DTYPES, Checkpoint
from ltx2_tuner.checkpoint.modules import assign, checked_shapes, on_meta
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.quantization import fp8
from ltx2_tuner.quantization.formats import Nf4Quantiser, WeightFormat, freeze, stored_fp8
from ltx2_tuner.quantization.frozen import FrozenLinear, Nf4Linear
from ltx2_tuner.quantization.nf4 import Nf4Tensor
from ltx2_tuner.quantization.targets import is_quantisable

logger = logging.getLogger(__name__)

Placement = str | torch.device | Callable[[str], torch.device]
Transform = Callable[[str, Tensor], Tensor]
_COMPANIONS = (".weight_scale", ".scale_weight", ".input_scale", ".scale_input", ".comfy_quant", ".nf4_shape")


def load_transformer(
    checkpoint: Checkpoint,
    variant: str = "av",
    device: Placement = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    weights: WeightFormat | None = None,
    quantize_device: str | torch.device | None = None,
    transform: Transform | None = None,
    column_scales: Mapping[str, Tensor] | None = None,
    quantise_nf4: Nf4Quantiser | None = None,
    progress: bool = True,
) -> LTXTransformer:
    """The frozen transformer in eval mode; the matrices of its blocks are `FrozenLinear` layers.

    Args:
        variant: "av", "video" or "audio": which parts to build and read.
        device: where tensors live: a device, or a function of the parameter name (`transformer_blocks.3.attn1...`).
        dtype: compute dtype. Modulation tables stored in float32 stay float32.
        weights: how block matrices are stored; default dense. A pre-quantised nf4 file is always used as it is.
        quantize_device: where weights are quantised; default where they will live.
        transform: `(name, weight) -> weight` on every 2-D weight before it is quantised, in a float dtype: merging
            LoRAs. It returns its argument itself where it changes nothing.
        column_scales: AWQ factors by weight name.
        quantise_nf4: LoftQ in the place of plain nf4 quantisation.

    Raises:
        UserError: tensors are missing, of other shapes or of unknown kinds.
    """
    config = _config(checkpoint)
    with on_meta():
        model = LTXTransformer(config, variant)
    names = checked_shapes(checkpoint, "transformer", model, _stored_shape(checkpoint))
    if variant == "av":
        _check_unexpected(checkpoint, names)
    loader = _Loader(checkpoint, device, dtype, weights or WeightFormat(), quantize_device, transform)
    loader.column_scales = column_scales or {}
    loader.quantise_nf4 = quantise_nf4
    order = sorted(names, key=lambda key: checkpoint.entry(names[key]).start)
    total = sum(checkpoint.entry(name).nbytes for name in names.values())
    with tqdm(total=total, desc="transformer", unit="B", unit_scale=True, disable=not progress) as bar:
        for key in order:
            loader.load(model, key, names)
            bar.update(checkpoint.entry(names[key]).nbytes)
    return model.requires_grad_(False).eval()


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        dtype: torch.dtype,
        form: WeightFormat,
        quantize_device: str | torch.device | None,
        transform: Transform | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.place = placement if callable(placement) else lambda _name: torch.device(placement)
        self.dtype = dtype
        self.form = form
        self.quantize_device = quantize_device
        self.transform = transform
        self.column_scales: Mapping[str, Tensor] = {}
        self.quantise_nf4: Nf4Quantiser | None = None
        self._warned = False

    def load(self, model: nn.Module, key: str, names: Mapping[str, str]) -> None:
        """Read the tensor `key` of the model; a block matrix brings its bias and scales and becomes a frozen layer."""
        path, _, leaf = key.rpartition(".")
        if is_quantisable(key, self._dense_shape(model, path, leaf)):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], self._frozen(path, names))
        elif not (leaf == "bias" and is_quantisable(f"{path}.weight", (0, 0)) and f"{path}.weight" in names):
            assign(model, key, self._plain(key, names[key]))

    def _dense_shape(self, model: nn.Module, path: str, leaf: str) -> tuple[int, ...]:
        layer = model.get_submodule(path)
        return tuple(getattr(layer, leaf).shape)

    def _plain(self, key: str, name: str) -> Tensor:
        stored = self.checkpoint.entry(name).dtype
        if stored in FP8_DTYPES:
            tensor = self._dequantised(name, self.place(key))
        else:
            tensor = self.checkpoint.read(name, self.place(key))
        if self.transform is not None and tensor.dim() == 2 and key.endswith(".weight"):
            tensor = self.transform(key, tensor)
        keep = key.endswith("scale_shift_table") or "scale_shift_table_" in key
        return tensor if keep and tensor.dtype == torch.float32 else tensor.to(self.dtype)

    def _frozen(self, path: str, names: Mapping[str, str]) -> FrozenLinear:
        key, name = f"{path}.weight", names[f"{path}.weight"]
        home = self.place(key)
        bias_name = names.get(f"{path}.bias")
        bias = None if bias_name is None else self.checkpoint.read(bias_name, home, self.dtype)
        stored = self.checkpoint.entry(name).dtype
        if self.checkpoint.is_nf4 and stored == torch.uint8:
            return self._stored_nf4(name, bias, home)
        work = torch.device(self.quantize_device or home) if self.form.kind != "dense" else home
        if stored in FP8_DTYPES:
            layer = self._from_fp8(key, name, bias, home, work)
        else:
            weight = self.checkpoint.read(name, work)
            layer = self._freeze(key, weight if self.transform is None else self.transform(key, weight), bias)
        return layer.to(home)

    def _from_fp8(
        self, key: str, name: str, bias: Tensor | None, home: torch.device, work: torch.device
    ) -> FrozenLinear:
        if self.form.kind == "fp8" and self.transform is None:
            codes, scale = self.checkpoint.read(name, home), self._scale(name, home)
            return stored_fp8(codes, scale, bias, self.form, self.dtype)
        dense = self._dequantised(name, work)
        changed = dense if self.transform is None else self.transform(key, dense)
        if self.form.kind == "fp8" and changed is dense:
            return stored_fp8(self.checkpoint.read(name, home), self._scale(name, home), bias, self.form, self.dtype)
        if self.form.kind == "fp8" and not self._warned:
            logger.warning("%s is fp8: merged weights are quantised a second time", self.checkpoint.path)
            self._warned = True
        return self._freeze(key, changed, bias)

    def _freeze(self, key: str, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        column_scale = self.column_scales.get(key)
        return freeze(
            key,
            weight,
            bias,
            self.form,
            self.dtype,
            column_scale=None if column_scale is None else column_scale.to(weight.device),
            quantise_nf4=self.quantise_nf4,
        )

    def _stored_nf4(self, name: str, bias: Tensor | None, home: torch.device) -> FrozenLinear:
        if self.transform is not None:
            raise UserError(
                f"{self.checkpoint.path}: is already nf4, nothing can be merged into it; "
                "give the original checkpoint with --base_weights"
            )
        scale = self.checkpoint.read(f"{name.removesuffix('.weight')}.scale_weight", home)
        return Nf4Linear(Nf4Tensor(self.checkpoint.read(name, home), scale), bias, self.dtype)

    def _scale(self, name: str, device: torch.device) -> Tensor | None:
        """The scale of an fp8 weight under either name in circulation; None for a plain cast."""
        base = name.removesuffix(".weight")
        found = next(
            (f"{base}{end}" for end in (".weight_scale", ".scale_weight") if f"{base}{end}" in self.checkpoint), None
        )
        return None if found is None else self.checkpoint.read(found, device)

    def _dequantised(self, name: str, device: torch.device) -> Tensor:
        return fp8.dequantise(self.checkpoint.read(name, device), self._scale(name, device), self.dtype)


def _config(checkpoint: Checkpoint) -> TransformerConfig:
    if checkpoint.version == "2.5":
        raise UserError(
            f"{checkpoint.path}: is an LTX-2.5 checkpoint, which cannot be trained here; give an LTX-2 or LTX-2.3 one"
        )
    try:
        return TransformerConfig.from_dict(checkpoint.config.get("transformer", {}))
    except ValueError as error:
        raise UserError(
            f"{checkpoint.path}: its transformer is none this program knows ({error}); give an LTX-2 or LTX-2.3 file"
        ) from error


def _stored_shape(checkpoint: Checkpoint) -> Callable[[str, tuple[int, ...]], tuple[int, ...]]:
    """The shape in the file of a parameter: nf4 packs two inputs into a byte. Refuses formats of other tools."""

    def shape(name: str, dense: tuple[int, ...]) -> tuple[int, ...]:
        dtype = checkpoint.entry(name).dtype
        base = name.removesuffix(".weight")
        if checkpoint.is_nf4 and dtype == torch.uint8 and f"{base}.scale_weight" in checkpoint:
            return dense[0], dense[1] // 2
        if f"{base}.weight_scale_2" in checkpoint or dtype in (torch.uint8, torch.int8):
            raise UserError(
                f"{checkpoint.path}: {name} is stored in nvfp4 or int8, which is not supported; "
                "give a bf16 or fp8 checkpoint, or make an nf4 one with ltx2_quantize_model.py"
            )
        return dense

    return shape


def _check_unexpected(checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    extra = [
        name
        for key, name in checkpoint.component("transformer").items()
        if key not in names and not name.endswith(_COMPANIONS) and not key.endswith("scaled_fp8")
    ]
    in_blocks = [name for name in extra if "transformer_blocks." in name]
    if in_blocks:
        raise UserError(
            f"{checkpoint.path}: its config does not describe {len(in_blocks)} tensors of its transformer blocks, such "
            f"as {in_blocks[0]}; give an LTX-2 or LTX-2.3 checkpoint"
        )
    if extra:
        logger.warning("%s: ignored %d unknown tensors: %s", checkpoint.path, len(extra), ", ".join(extra[:8]))
