"""Loading the transformer: tensor by tensor from the file to where it will live, quantised on the way.

Besides what is placed there, the host never holds more than the layer under way and what threads read ahead.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ltx2_tuner.checkpoint.checkpoint import FP8_DTYPES, Checkpoint
from ltx2_tuner.checkpoint.modules import CONFIG_ERRORS, assign, checked_shapes, on_meta
from ltx2_tuner.checkpoint.precision import effective_format
from ltx2_tuner.checkpoint.read_ahead import ReadAhead
from ltx2_tuner.devices import exact
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.quantization import fp8
from ltx2_tuner.quantization.formats import Nf4Quantiser, WeightFormat, freeze, stored_fp8
from ltx2_tuner.quantization.frozen import FrozenLinear, Nf4Linear
from ltx2_tuner.quantization.nf4 import Nf4Tensor
from ltx2_tuner.quantization.targets import is_quantisable

logger = logging.getLogger(__name__)

Transform = Callable[[str, Tensor], Tensor]
OnBlock = Callable[[int, nn.Module], None]
_COMPANIONS = (".weight_scale", ".scale_weight", ".input_scale", ".scale_input", ".comfy_quant", ".nf4_shape")


def load_transformer(
    checkpoint: Checkpoint,
    variant: str = "av",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    weights: WeightFormat | None = None,
    quantize_device: str | torch.device | None = None,
    transform: Transform | None = None,
    column_scales: Mapping[str, Tensor] | None = None,
    quantise_nf4: Nf4Quantiser | None = None,
    on_block: OnBlock | None = None,
    progress: bool = True,
) -> LTXTransformer:
    """The frozen transformer in eval mode; the matrices of its blocks are `FrozenLinear` layers.

    Args:
        variant: "av", "video" or "audio": which parts to build and read.
        device: where tensors live.
        dtype: compute dtype. Modulation tables stored in float32 stay float32.
        weights: how block matrices are stored; default dense. A pre-quantised nf4 file is always used as it is.
        quantize_device: where weights are quantised; default where they will live.
        transform: `(name, weight) -> weight` on every 2-D weight before it is quantised, in a float dtype: merging
            LoRAs. It returns its argument itself where it changes nothing.
        column_scales: AWQ factors by weight name.
        quantise_nf4: LoftQ in the place of plain nf4 quantisation.
        on_block: called with the index of each block and the block when it is whole, before the next one is read.

    Raises:
        UserError: tensors are missing, of other shapes or of unknown kinds.
    """
    reader = TransformerReader(
        checkpoint, variant, device, dtype, weights or WeightFormat(), quantize_device, transform
    )
    reader.column_scales = column_scales or {}
    reader.quantise_nf4 = quantise_nf4
    total = sum(reader.nbytes(key) for key in reader.keys)
    order = sorted(reader.keys, key=_block_of)
    shown = tqdm(total=total, desc="transformer", unit="B", unit_scale=True, disable=not progress)
    with shown as bar, reader.reading_ahead(order):
        for block, keys in itertools.groupby(order, _block_of):
            for key in keys:
                reader.load(key)
                bar.update(reader.nbytes(key))
            if on_block is not None and block >= 0:
                on_block(block, reader.model.transformer_blocks[block])
    return reader.model.requires_grad_(False).eval()


class TransformerReader:
    """A transformer without memory and what fills it, parameter by parameter.

    Attributes:
        model: the module, on meta until `load`.
        keys: its parameter names in the order of the file.
        column_scales, quantise_nf4: as in `load_transformer`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        variant: str,
        device: str | torch.device,
        dtype: torch.dtype,
        form: WeightFormat,
        quantize_device: str | torch.device | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.model = _empty_model(checkpoint, variant)
        self.names = checked_shapes(checkpoint, "transformer", self.model, _stored_shape(checkpoint))
        if variant == "av":
            _check_unexpected(checkpoint, self.names)
        self.keys = sorted(self.names, key=lambda key: checkpoint.entry(self.names[key]).start)
        self.targets = {  # paths of the block matrices
            key.removesuffix(".weight")
            for key, tensor in self.model.state_dict().items()
            if is_quantisable(key, tensor.shape)
        }
        self.checkpoint = checkpoint
        self.home = exact(device)
        self.dtype = dtype
        self.form = effective_format(checkpoint, form, self.home)
        self.quantize_device = self.home if quantize_device is None else exact(quantize_device)
        self.transform = transform
        self.column_scales: Mapping[str, Tensor] = {}
        self.quantise_nf4: Nf4Quantiser | None = None
        self._read = checkpoint.read
        self._warned = False

    @contextlib.contextmanager
    def reading_ahead(self, keys: Iterable[str]) -> Iterator[None]:
        """Within the block `load` is called with `keys`, in this order: their tensors are read ahead."""
        main = [key for key in keys if key.endswith(".weight") or key.rpartition(".")[0] not in self.targets]
        with ReadAhead(self.checkpoint, [(self.names[key], self._workplace(key)) for key in main]) as ahead:
            self._read = ahead.read
            try:
                yield
            finally:
                self._read = self.checkpoint.read

    def nbytes(self, key: str) -> int:
        """Bytes of a parameter in the file."""
        return self.checkpoint.entry(self.names[key]).nbytes

    def load(self, key: str) -> None:
        """Read one parameter. The weight of a block matrix brings bias and scale and becomes a frozen layer."""
        path, _, leaf = key.rpartition(".")
        if path not in self.targets:
            assign(self.model, key, self._plain(key, self.names[key]))
        elif leaf == "weight":
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, self._frozen(path))

    def _workplace(self, key: str) -> torch.device:
        """Where the tensor of a parameter is read to: where it is quantised, or else where it will live."""
        stored = self.checkpoint.entry(self.names[key]).dtype
        ready = stored == torch.uint8 or (stored in FP8_DTYPES and self.form.kind == "fp8" and self.transform is None)
        quantised = key.rpartition(".")[0] in self.targets and self.form.kind != "dense" and not ready
        return self.quantize_device if quantised else self.home

    def _plain(self, key: str, name: str) -> Tensor:
        stored = self.checkpoint.entry(name).dtype
        if stored in FP8_DTYPES:
            tensor = self._dequantised(name, self.home)
        else:
            tensor = self._read(name, self._workplace(key))
        if tensor.dim() == 2 and key.endswith(".weight"):
            tensor = self._transformed(key, tensor)
        keep = key.endswith("scale_shift_table") or "scale_shift_table_" in key
        return tensor if keep and tensor.dtype == torch.float32 else tensor.to(self.dtype)

    def _frozen(self, path: str) -> FrozenLinear:
        key, name = f"{path}.weight", self.names[f"{path}.weight"]
        bias_name = self.names.get(f"{path}.bias")
        bias = None if bias_name is None else self.checkpoint.read(bias_name, self.home, self.dtype)
        stored = self.checkpoint.entry(name).dtype
        if self.checkpoint.is_nf4 and stored == torch.uint8:
            return self._stored_nf4(name, bias)
        if stored in FP8_DTYPES:
            layer = self._from_fp8(key, name, bias)
        else:
            # What an fp8 file keeps in bf16 (its first and last blocks) is kept so.
            form = WeightFormat() if self.checkpoint.is_fp8 and self.form.kind == "fp8" else self.form
            layer = self._freeze(key, self._transformed(key, self._read(name, self._workplace(key))), bias, form)
        return layer.to(self.home)

    def _from_fp8(self, key: str, name: str, bias: Tensor | None) -> FrozenLinear:
        dense = changed = None
        if self.form.kind != "fp8" or self.transform is not None:
            dense = self._dequantised(name, self._workplace(key))
            changed = self._transformed(key, dense)
        if self.form.kind == "fp8" and changed is dense:
            return stored_fp8(self._read(name, self.home), self._scale(name, self.home), bias, self.form, self.dtype)
        if self.form.kind == "fp8" and not self._warned:
            logger.warning("%s is fp8: merged weights are quantised a second time", self.checkpoint.path)
            self._warned = True
        form = self.form
        if form.fp8_scales == "none":  # as a file with scales is asked for; without them small values would be lost
            form = replace(form, fp8_scales="row" if form.fp8_compute else "block")
        return self._freeze(key, changed, bias, form)

    def _transformed(self, key: str, weight: Tensor) -> Tensor:
        """The weight itself when nothing is merged into it, else the merged one in its dtype."""
        changed = weight if self.transform is None else self.transform(key, weight)
        return changed.to(weight.dtype)

    def _freeze(self, key: str, weight: Tensor, bias: Tensor | None, form: WeightFormat) -> FrozenLinear:
        column_scale = self.column_scales.get(key)
        return freeze(
            key,
            weight,
            bias,
            form,
            self.dtype,
            column_scale=None if column_scale is None else column_scale.to(weight.device),
            quantise_nf4=self.quantise_nf4,
        )

    def _stored_nf4(self, name: str, bias: Tensor | None) -> FrozenLinear:
        if self.transform is not None:
            raise UserError(
                f"{self.checkpoint.path}: is already nf4, nothing can be merged into it; "
                "give the original checkpoint with --base_weights"
            )
        return Nf4Linear(Nf4Tensor(self._read(name, self.home), self._scale(name, self.home)), bias, self.dtype)

    def _scale(self, name: str, device: torch.device) -> Tensor | None:
        """The scale of a weight under either name in circulation; None for a plain cast to fp8."""
        base = name.removesuffix(".weight")
        found = next(
            (name for name in (f"{base}.weight_scale", f"{base}.scale_weight") if name in self.checkpoint), None
        )
        if found is None:
            return None
        shape = self.checkpoint.entry(found).shape
        rows, columns = self.checkpoint.entry(name).shape
        per_block = len(shape) == 3 and shape[::2] == (rows, 1) and shape[1] > 0 and columns % shape[1] == 0
        if shape not in ((), (1,), (rows, 1)) and not per_block:
            raise UserError(
                f"{self.checkpoint.path}: {found} has the shape {list(shape)}, which is no scale of a "
                f"{rows} x {columns} matrix; give a bf16 checkpoint, or copy the file again"
            )
        return self.checkpoint.read(found, device)

    def _dequantised(self, name: str, device: torch.device) -> Tensor:
        return fp8.dequantise(self._read(name, device), self._scale(name, device), self.dtype)


def _block_of(key: str) -> int:
    """Number of the block that a parameter belongs to, -1 outside of the blocks."""
    root, number, *_ = [*key.split(".", 2), ""]
    return int(number) if root == "transformer_blocks" else -1


def _empty_model(checkpoint: Checkpoint, variant: str) -> LTXTransformer:
    if checkpoint.version == "2.5":
        raise UserError(
            f"{checkpoint.path}: is an LTX-2.5 checkpoint, which cannot be trained here; give an LTX-2 or LTX-2.3 one"
        )
    try:
        with on_meta():
            return LTXTransformer(TransformerConfig.from_dict(checkpoint.config.get("transformer", {})), variant)
    except CONFIG_ERRORS as error:
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
