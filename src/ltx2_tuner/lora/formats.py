"""LoRA key formats: any of them in, three of them out (01 section 8).

| format | names | suffixes |
|---|---|---|
| original (kohya) | `lora_unet_model_transformer_blocks_0_attn1_to_q` | `.lora_down.weight .lora_up.weight .alpha` |
| comfy | `diffusion_model.transformer_blocks.0.attn1.to_q` | `.lora_A.weight .lora_B.weight`, alpha folded into B |
| diffusers | `transformer.transformer_blocks.0.attn1.to_q` | as comfy |

The official trainer's files are comfy files. Inside the suite a LoRA is a dict from layer path to `LoRAMatrices`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.names import NameTable, comfy_name, diffusers_name, kohya_name

FORMATS = ("original", "comfy", "diffusers")

_PARTS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
# Parts of adapters that are no plain low-rank pair.
_FOREIGN = re.compile(
    r"\.(lora_magnitude_vector|dora_scale|lokr_(w1|w2|t2)(_[ab])?|hada_(w1|w2|t1|t2)(_[ab])?|oft_R|oft_blocks|on_input"
    r"|diff(_b)?)(\.|$)"
)


@dataclass(frozen=True)
class LoRAMatrices:
    """One layer's adapter: down (r, in), up (out, r), W' = W + multiplier · alpha/r · up·down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def delta(self, multiplier: float = 1.0) -> Tensor:
        """multiplier · alpha/r · up·down in float32, (out, in)."""
        return (multiplier * self.scale) * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class LoRAFile:
    """What a LoRA file holds.

    Attributes:
        source: the file's path, for messages.
        format: original, comfy or diffusers.
        modules: layer path -> matrices.
        unknown: names of modules that the table has no layer for.
        lonely: names of modules that have only one of the two matrices.
        metadata: the file's own.
    """

    source: str
    format: str
    modules: dict[str, LoRAMatrices]
    unknown: tuple[str, ...] = ()
    lonely: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def parse(
    tensors: Mapping[str, Tensor],
    table: NameTable | None = None,
    *,
    source: str = "the LoRA",
    metadata: Mapping[str, str] | None = None,
) -> LoRAFile:
    """Recognise a LoRA of any format by its keys.

    Args:
        tensors: the file's tensors.
        table: the layers that exist; None takes every layer of LTX-2.0 and 2.3.
        source: the file's path, for messages.

    Raises:
        UserError: an adapter of another kind (DoRA, LoKr, …), matrices that do not fit together, or no LoRA keys.
    """
    table = table or NameTable.static()
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        name, part = _split(key)
        if part is not None:
            parts.setdefault(name, {})[part] = tensor
        elif _FOREIGN.search(key):
            raise UserError(
                f"{source}: '{key}' was made by another network module (not plain LoRA); "
                "use it with the software that made it"
            )
        else:
            strange.append(key)
    pairs = {name: found for name, found in parts.items() if "down" in found and "up" in found}
    if not pairs:
        example = f", such as '{strange[0]}'" if strange else ""
        raise UserError(f"{source}: no LoRA matrices among its {len(tensors)} tensors{example}; give a LoRA file")
    modules: dict[str, LoRAMatrices] = {}
    unknown = list(strange)
    for name, found in pairs.items():
        path = table.resolve(name)
        if path is None:
            unknown.append(name)
        elif path in modules:
            raise UserError(f"{source}: two of its modules are the layer {path}; remove one of them")
        else:
            modules[path] = _matrices(name, found, source)
    lonely = tuple(sorted(parts.keys() - pairs.keys()))
    format_name = _format_of(next(iter(pairs)), tensors)
    return LoRAFile(source, format_name, modules, tuple(sorted(unknown)), lonely, dict(metadata or {}))


def to_original(modules: Mapping[str, LoRAMatrices], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """kohya's keys, alpha included, everything in `dtype` (None: as the matrices are)."""
    state: dict[str, Tensor] = {}
    for path, module in modules.items():
        name = kohya_name(path)
        target = dtype or module.down.dtype
        state[f"{name}.lora_down.weight"] = _stored(module.down, target)
        state[f"{name}.lora_up.weight"] = _stored(module.up, dtype or module.up.dtype)
        state[f"{name}.alpha"] = torch.tensor(module.alpha, dtype=target)
    return state


def to_comfy(modules: Mapping[str, LoRAMatrices], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """ComfyUI's keys: B = up · alpha/r computed in float32, no alpha keys (other loaders ignore or refuse them)."""
    return _folded(modules, comfy_name, dtype)


def to_diffusers(modules: Mapping[str, LoRAMatrices], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """diffusers' keys, alpha folded as in `to_comfy`."""
    return _folded(modules, diffusers_name, dtype)


RENAMERS: dict[str, Callable[[str], str]] = {
    "original": kohya_name,
    "comfy": comfy_name,
    "diffusers": diffusers_name,
}
WRITERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "original": to_original,
    "comfy": to_comfy,
    "diffusers": to_diffusers,
}


def any_to_comfy(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """ComfyUI's keys for a kohya state of any network module.

    Plain LoRA has alpha folded in; adapters of other kinds (LoKr, LoHa, …) keep their own parts and alpha.
    """
    if not any(_FOREIGN.search(key) for key in tensors):
        return to_comfy(parse(tensors).modules, dtype)
    table = NameTable.static()
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        path = table.resolve(name)
        if path is None:
            raise UserError(f"the network's module {name} is no layer of LTX-2 that a ComfyUI file can name")
        part = part.replace("lora_down.", "lora_A.").replace("lora_up.", "lora_B.")
        state[f"{comfy_name(path)}.{part}"] = _stored(tensor, dtype or tensor.dtype)
    return state


def comfy_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """A ComfyUI file's metadata: a copy, plus the reference factor under the plain keys that pipelines read."""
    copy = dict(metadata)
    factor = copy.get("ss_reference_downscale_factor")
    if factor not in (None, "1", "1.0", "None"):
        copy.setdefault("reference_downscale_factor", factor)
        copy.setdefault("reference_spatial_scale_factor", factor)
    return copy


def unfold_alpha(modules: Mapping[str, LoRAMatrices]) -> dict[str, LoRAMatrices]:
    """The same adapters with alpha = r and the scale folded into `up` in float32."""
    return {
        path: LoRAMatrices(m.down, m.up if m.scale == 1.0 else m.up.float() * m.scale, float(m.rank))
        for path, m in modules.items()
    }


def _folded(
    modules: Mapping[str, LoRAMatrices], rename: Callable[[str], str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path, module in modules.items():
        name = rename(path)
        up = module.up if module.scale == 1.0 else module.up.float() * module.scale
        state[f"{name}.lora_A.weight"] = _stored(module.down, dtype or module.down.dtype)
        state[f"{name}.lora_B.weight"] = _stored(up, dtype or module.up.dtype)
    return state


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _split(key: str) -> tuple[str, str | None]:
    """Module name and part (down, up, alpha) of a key; the longest suffix wins, part None when there is none."""
    found = [suffix for suffix in _PARTS if key.endswith(suffix)]
    if not found:
        return key, None
    suffix = max(found, key=len)
    return key[: -len(suffix)], _PARTS[suffix]


def _matrices(name: str, found: Mapping[str, Tensor], source: str) -> LoRAMatrices:
    down, up = found["down"], found["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise UserError(
            f"{source}: the matrices of {name} do not fit together (down {tuple(down.shape)}, up {tuple(up.shape)}); "
            "the file is damaged or no LoRA for linear layers"
        )
    alpha = found.get("alpha")
    if alpha is None:
        return LoRAMatrices(down, up, float(down.shape[0]))
    if alpha.numel() != 1 or not torch.isfinite(alpha.float()).all():
        raise UserError(f"{source}: the alpha of {name} is no finite number; the file is damaged")
    return LoRAMatrices(down, up, float(alpha.float()))


def _format_of(name: str, tensors: Mapping[str, Tensor]) -> str:
    if name.startswith("lora_unet_") or any(key.endswith(".lora_down.weight") for key in tensors):
        return "original"
    bare = name.removeprefix("base_model.model.").removeprefix("model.")
    return "diffusers" if bare.startswith(("transformer.", "connectors.")) else "comfy"
