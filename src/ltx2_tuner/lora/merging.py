"""Several LoRAs into one (06 section 9): by concatenation, exactly, or by mutual projection and a new SVD."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.formats import LoRAFile, LoRAMatrices

RANK_MODES = {"sum": lambda a, b: a + b, "max": max, "min": min}
# Singular values below this share of the largest are rounding, not directions.
_NUMERICAL_ZERO = 1e-6
# Facts about the model a LoRA belongs to; the rest of the plain keys describe one training run.
_REFERENCE_KEYS = ("reference_downscale_factor", "reference_spatial_scale_factor", "reference_temporal_scale_factor")
_WARN_WHEN_DIFFERENT = ("ss_ltx_version", "ss_reference_downscale_factor", *_REFERENCE_KEYS)

Modules = dict[str, LoRAMatrices]


@dataclass(frozen=True)
class OrthogonalOptions:
    """How two LoRAs are merged by projection.

    Attributes:
        fraction: share of the other LoRA's singular directions that is projected out, 0 to 1.
        rank_mode: rank of the result from the two ranks: a key of RANK_MODES.
        device: where the factorisations run.
    """

    fraction: float = 0.5
    rank_mode: str = "sum"
    device: str | torch.device = "cpu"


def merge_concat(loras: Sequence[LoRAFile], multipliers: Sequence[float]) -> Modules:
    """Stack the ranks: B·A of the result is the weighted sum of the inputs', and alpha is its rank; float32."""
    merged = {}
    for path in _paths(loras):
        parts = [(lora.modules[path], m) for lora, m in zip(loras, multipliers) if path in lora.modules]
        _check_sizes(path, [module for module, _ in parts], loras)
        down = torch.cat([module.down.float() for module, _ in parts])
        up = torch.cat([module.up.float() * (m * module.scale) for module, m in parts], dim=1)
        merged[path] = LoRAMatrices(down, up, float(down.shape[0]))
    return merged


def merge_orthogonal(loras: Sequence[LoRAFile], multipliers: Sequence[float], options: OrthogonalOptions) -> Modules:
    """Project each of two LoRAs off the other's leading input directions, add them, and factorise the sum anew.

    Raises:
        UserError: not exactly two inputs, or layers of differing sizes.
    """
    if len(loras) != 2:
        raise UserError(f"--merge_method orthogonal merges exactly 2 files, not {len(loras)}; use concat for more")
    merged = {}
    for path in tqdm(_paths(loras), desc="merge", unit="layer"):
        modules = [lora.modules[path] for lora in loras if path in lora.modules]
        if len(modules) == 1:
            alone = [lora for lora in loras if path in lora.modules]
            weights = [m for lora, m in zip(loras, multipliers) if path in lora.modules]
            part = [LoRAFile(alone[0].source, alone[0].format, {path: modules[0]})]
            merged |= merge_concat(part, weights)
            continue
        _check_sizes(path, modules, loras)
        merged[path] = _orthogonal(modules, multipliers, options)
    return merged


def _orthogonal(modules: Sequence[LoRAMatrices], multipliers: Sequence[float], o: OrthogonalOptions) -> LoRAMatrices:
    """Everything on factors of at most r₁ + r₂ columns; float64, because differences of near-equal matrices matter."""
    ups = [m.up.to(o.device, torch.float64) * (weight * m.scale) for m, weight in zip(modules, multipliers)]
    downs = [m.down.to(o.device, torch.float64) for m in modules]
    projected = []
    for index in (0, 1):
        other = _top_inputs(ups[1 - index], downs[1 - index], o.fraction)  # (in, k)
        projected.append(downs[index] - (downs[index] @ other) @ other.T)
    left, values, right = _factor_svd(torch.cat(ups, dim=1), torch.cat(projected))
    wanted = RANK_MODES[o.rank_mode](modules[0].rank, modules[1].rank)
    rank = max(1, min(wanted, values.numel()))
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return LoRAMatrices(down.float().cpu(), up.float().cpu(), float(rank))


def _top_inputs(up: Tensor, down: Tensor, fraction: float) -> Tensor:
    """The leading right singular vectors of up·down, `fraction` of those that are not numerically zero: (in, k)."""
    _, values, right = _factor_svd(up, down)
    largest = values[0] if values.numel() else values.new_zeros(())
    count = int((values > _NUMERICAL_ZERO * largest).sum()) if largest > 0 else 0
    return right[: round(fraction * count)].T


def _factor_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of up (out, r) · down (r, in) without forming the product."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner_left, values, inner_right @ right.T


def output_dtype(loras: Sequence[LoRAFile]) -> torch.dtype:
    """torch's promotion over all matrices; float64 becomes float32, as do types that do not promote."""
    found = {tensor.dtype for lora in loras for module in lora.modules.values() for tensor in (module.up, module.down)}
    if not found <= {torch.float16, torch.bfloat16, torch.float32}:
        return torch.float32
    promoted = found.pop()
    for dtype in found:
        promoted = torch.promote_types(promoted, dtype)
    return promoted


def merged_metadata(
    loras: Sequence[LoRAFile],
    multipliers: Sequence[float],
    merged: Mapping[str, LoRAMatrices],
    extra: Mapping[str, str],
) -> tuple[dict[str, str], list[str]]:
    """Metadata of the result and warnings about inputs that contradict each other.

    Kept are the `ss_*` keys and reference factors on which all inputs agree; file names are without folders.
    """
    first, *others = (lora.metadata for lora in loras)
    kept = {
        key: value
        for key, value in first.items()
        if (key.startswith("ss_") or key in _REFERENCE_KEYS) and all(other.get(key) == value for other in others)
    }
    ranks = {module.rank for module in merged.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    kept |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    kept |= {
        "merge_sources": json.dumps([Path(lora.source).name for lora in loras], ensure_ascii=False),
        "merge_multipliers": json.dumps(list(multipliers)),
        **extra,
    }
    warnings = []
    for key in _WARN_WHEN_DIFFERENT:
        values = [lora.metadata.get(key) for lora in loras]
        given = {value for value in values if value is not None}
        if len(given) > 1 or (len(given) == 1 and None in values and key != "ss_ltx_version"):
            listed = ", ".join(f"{Path(lora.source).name}: {value}" for lora, value in zip(loras, values))
            warnings.append(f"the inputs differ in {key} ({listed})")
    return kept, warnings


def _paths(loras: Sequence[LoRAFile]) -> list[str]:
    return list(dict.fromkeys(path for lora in loras for path in lora.modules))


def _check_sizes(path: str, modules: Sequence[LoRAMatrices], loras: Sequence[LoRAFile]) -> None:
    sizes = {(module.up.shape[0], module.down.shape[1]) for module in modules}
    if len(sizes) > 1:
        listed = " and ".join(f"{out}x{into}" for out, into in sorted(sizes))
        names = ", ".join(Path(lora.source).name for lora in loras)
        raise UserError(f"{names}: {path} is of size {listed}; merge LoRAs of the same model")
