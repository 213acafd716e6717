"""LyCORIS networks: layer selection, the TOML of `--lycoris_config`, quantised bases, and LoKr's start scale.

LyCORIS chooses layers by a preset that is class-wide state; ours is put in for the creation and taken out again. It
names every layer of the blocks, so that a TOML pattern can give any of them its own settings, and leaves out the layers
that do not run in the mode and the attention gates (unless a pattern names them).
"""

from __future__ import annotations

import contextlib
import logging
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ltx2_tuner.errors import UserError, did_you_mean
from ltx2_tuner.lora.network import generator_for
from ltx2_tuner.lora.options import NetworkOptions
from ltx2_tuner.lora.targets import BLOCKS, GROUPS, linear_layers, runs_in

logger = logging.getLogger(__name__)

ALGORITHMS = ("lora", "loha", "lokr", "locon", "ia3", "full")
_NETWORK_KEYS = ("base_algo", "base_factor", "description", "modules", "init")
_PRESET = "ltx2_tuner"
# State of the LyCORIS class that a preset changes.
_CLASS_STATE = (
    "ENABLE_CONV",
    "UNET_TARGET_REPLACE_MODULE",
    "UNET_TARGET_REPLACE_NAME",
    "TEXT_ENCODER_TARGET_REPLACE_MODULE",
    "TEXT_ENCODER_TARGET_REPLACE_NAME",
    "MODULE_ALGO_MAP",
    "NAME_ALGO_MAP",
    "USE_FNMATCH",
    "TARGET_EXCLUDE_NAME",
)
_DORA = ("dora_wd", "weight_decompose")


@dataclass(frozen=True)
class LycorisSettings:
    """TOML and `--network_args` together.

    Attributes:
        arguments: keywords of LyCORIS' create_network.
        modules: name pattern (with `*`) or class name -> settings of its layers.
        lokr_norm: start scale of LoKr, None to leave LyCORIS' own.
    """

    arguments: dict[str, object] = field(default_factory=dict)
    modules: dict[str, dict[str, object]] = field(default_factory=dict)
    lokr_norm: float | None = None

    @property
    def algorithms(self) -> set[str]:
        """Every algorithm in use."""
        return {
            str(self.arguments.get("algo", "lora")),
            *(str(m["algo"]) for m in self.modules.values() if "algo" in m),
        }


def read_settings(options: NetworkOptions) -> LycorisSettings:
    """Merge `--lycoris_config` and `--network_args`, the latter winning.

    Raises:
        UserError: unreadable TOML, unknown keys or algorithms, values out of range.
    """
    arguments, modules, init = _read_toml(options.lycoris_config) if options.lycoris_config else ({}, {}, {})
    for key, text in options.args.items():
        if key.startswith("modules."):
            name, _, parameter = key.removeprefix("modules.").rpartition(".")
            modules.setdefault(name.strip("\"'"), {})[parameter] = _number(text)
        elif key.startswith("init."):
            init[key.removeprefix("init.")] = _number(text)
        elif key not in ("include_patterns", "exclude_patterns", "verbose"):
            arguments[key] = text
    if options.dropout is not None:
        arguments.setdefault("dropout", options.dropout)
    norm = options.init_lokr_norm if options.init_lokr_norm is not None else init.pop("lokr_norm", None)
    init.pop("lokr_norm", None)
    if init:
        raise UserError(f"LyCORIS init.{next(iter(init))}: unknown key; known is lokr_norm")
    settings = LycorisSettings(arguments, modules, None if norm is None else float(norm))
    _check(settings)
    return settings


def create_lycoris(
    transformer: nn.Module, options: NetworkOptions, *, mode: str, seed: int, quantised: bool
) -> nn.Module:
    """A LyCORIS network that is not applied yet.

    Raises:
        UserError: missing package, bad settings, an algorithm that a quantised base cannot carry, or no layer.
    """
    from ltx2_tuner.lora.build import import_module

    module = import_module(options.module)
    settings = read_settings(options)
    arguments = dict(settings.arguments)
    if quantised:
        _prepare_quantised(settings, arguments)
    with _preset(module, _selection(transformer, settings, mode)):
        network = module.create_network(
            1.0,
            options.dim,
            options.alpha,
            None,
            None,
            transformer,
            **{"preset": _PRESET, "warn_on_unmatched": False, **arguments},
        )
    if not network.unet_loras:
        raise UserError("LyCORIS found no layer to adapt; check the module patterns of --lycoris_config")
    if settings.lokr_norm is not None:
        scale_lokr(network, transformer, settings.lokr_norm, seed)
    logger.info("LyCORIS on %d layers (%s)", len(network.unet_loras), ", ".join(sorted(settings.algorithms)))
    return network


@torch.no_grad()
def scale_lokr(network: nn.Module, transformer: nn.Module, scale: float, seed: int) -> None:
    """Start LoKr layers from w1 = 1 and w2 = noise like the layer's own weight, times `scale`."""
    layers = {path.replace(".", "_"): layer for path, layer in linear_layers(transformer)}
    for adapter in network.unet_loras:
        if not (hasattr(adapter, "lokr_w1") or hasattr(adapter, "lokr_w1_a")):
            continue
        weight = layers[adapter.lora_name.removeprefix("lora_unet_")].weight.float()
        if hasattr(adapter, "lokr_w1"):
            adapter.lokr_w1.fill_(1.0)
        else:  # ones as a product: the first column and row carry them
            adapter.lokr_w1_a.zero_()[:, 0] = 1.0
            adapter.lokr_w1_b.zero_()[0] = 1.0
        factored = not hasattr(adapter, "lokr_w2")
        rows = (adapter.lokr_w2_a if factored else adapter.lokr_w2).shape[0]
        columns = (adapter.lokr_w2_b if factored else adapter.lokr_w2).shape[1]
        noise = torch.randn(rows, columns, generator=generator_for(seed, adapter.lora_name))
        w2 = (noise * weight.std().cpu() + weight.mean().cpu()) * scale
        if not factored:
            adapter.lokr_w2.copy_(w2)
            continue
        left, values, right = torch.linalg.svd(w2, full_matrices=False)
        rank = min(adapter.lokr_w2_a.shape[1], values.numel())
        root = values[:rank].sqrt()
        adapter.lokr_w2_a.zero_()[:, :rank] = left[:, :rank] * root
        adapter.lokr_w2_b.zero_()[:rank] = root[:, None] * right[:rank]


def _read_toml(path: Path) -> tuple[dict[str, object], dict[str, dict[str, object]], dict[str, object]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--lycoris_config {path}: cannot be read as TOML ({error}); correct it") from error
    network = content.get("network")
    if not isinstance(network, dict):
        raise UserError(f"--lycoris_config {path}: it has no [network] table; add one")
    for key in [*network, *(key for key in content if key != "network")]:
        if key not in _NETWORK_KEYS:
            known = ", ".join(_NETWORK_KEYS)
            raise UserError(
                f"--lycoris_config {path}: unknown key {key}{did_you_mean(key, _NETWORK_KEYS)}; known: {known}"
            )
    arguments = {key.removeprefix("base_"): network[key] for key in ("base_algo", "base_factor") if key in network}
    modules, init = network.get("modules", {}), network.get("init", {})
    if not (
        isinstance(modules, dict) and all(isinstance(m, dict) for m in modules.values()) and isinstance(init, dict)
    ):
        raise UserError(f'--lycoris_config {path}: [network.modules."name"] and [network.init] have to be tables')
    return arguments, {name: dict(table) for name, table in modules.items()}, dict(init)


def _check(settings: LycorisSettings) -> None:
    tables = {"base": settings.arguments, **settings.modules}
    for name, table in tables.items():
        algorithm = str(table.get("algo", "lora"))
        if algorithm not in ALGORITHMS:
            hint = did_you_mean(algorithm, ALGORITHMS)
            raise UserError(f"LyCORIS {name}: unknown algo {algorithm}{hint}; use one of {', '.join(ALGORITHMS)}")
        for key in ("dim", "factor"):
            value = _number(table[key]) if key in table else None
            unset = key == "factor" and value == -1  # LyCORIS' own word for automatic
            if value is not None and not unset and not (isinstance(value, int | float) and value > 0):
                raise UserError(f"LyCORIS {name}: {key} = {table[key]} has to be above 0")
    if settings.lokr_norm is not None and "lokr" not in settings.algorithms:
        raise UserError("--init_lokr_norm (lokr_norm) is for LoKr only; add algo=lokr or leave it out")


def _prepare_quantised(settings: LycorisSettings, arguments: dict[str, object]) -> None:
    if "full" in settings.algorithms:
        raise UserError("LyCORIS algo=full rebuilds weights, which quantised ones forbid; drop --fp8_base/--nf4_base")
    tables = [arguments, *settings.modules.values()]
    for key in _DORA:
        if any(str(table.get(key, "false")).lower() in ("true", "1", "yes") for table in tables):
            raise UserError(f"LyCORIS {key} rebuilds weights, which quantised ones forbid; drop {key}=True")
    arguments.setdefault("bypass_mode", "True")
    logger.warning("LyCORIS on a quantised model is slower and less tested than the built-in LoRA")


def _selection(transformer: nn.Module, settings: LycorisSettings, mode: str) -> dict[str, object]:
    """The LyCORIS preset: all layers of the blocks by name, the TOML's settings by pattern, what to leave out."""
    by_name: dict[str, dict[str, object]] = {}
    classes = {type(module).__name__ for module in transformer.modules()}
    for name, table in settings.modules.items():
        if "*" in name or name not in classes:
            by_name[name] = table
        else:
            by_name |= {f"{path}.*": table for path in _paths_of_class(transformer, name)}
    left_out = [f"{BLOCKS}.*.{part}.*" for part, group in GROUPS.items() if not runs_in(group, mode)]
    if not any("gate" in name for name in settings.modules):
        left_out.append("*.to_gate_logits")
    return {
        "enable_conv": True,
        "unet_target_module": [],
        "unet_target_name": [f"{BLOCKS}.*"],
        "text_encoder_target_module": [],
        "text_encoder_target_name": [],
        "module_algo_map": {},
        "name_algo_map": by_name,
        "use_fnmatch": True,
        "exclude_name": left_out,
    }


def _paths_of_class(transformer: nn.Module, name: str) -> list[str]:
    """Paths of the modules of a class, block numbers replaced by `*`."""
    found = [path for path, module in transformer.named_modules() if type(module).__name__ == name and path]
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in found))


@contextlib.contextmanager
def _preset(module, selection: Mapping[str, object]) -> Iterator[None]:
    """Our preset under its name in LyCORIS' table; class state and table are as before afterwards."""
    network_class = module.LycorisNetworkKohya
    before = {name: getattr(network_class, name) for name in _CLASS_STATE if hasattr(network_class, name)}
    module.PRESET[_PRESET] = dict(selection)
    try:
        yield
    finally:
        del module.PRESET[_PRESET]
        for name, value in before.items():
            setattr(network_class, name, value)


def _number(value: object) -> object:
    """Text of a number as int or float; anything else as it is."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
