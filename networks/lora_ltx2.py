"""The built-in LoRA under the kohya network protocol, so that the trainer talks to every network module alike."""

from __future__ import annotations

import ast
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ltx2_tuner.errors import UserError, did_you_mean
from ltx2_tuner.lora import Dropouts, LoRAFile, LoRANetwork, Targets, load_lora, save_original, select_layers, table_of
from ltx2_tuner.lora.groups import LearningRates, parameter_groups
from ltx2_tuner.lora.targets import describe, group_of, runs_in

logger = logging.getLogger(__name__)

# Keys of --network_args; upstream's convolution keys are known and have nothing to act on.
ARGUMENTS = ("include_patterns", "exclude_patterns", "loraplus_lr_ratio", "rank_dropout", "module_dropout", "verbose")
WITHOUT_EFFECT = ("conv_dim", "conv_alpha")

_TRUE, _FALSE = {"true", "1", "yes"}, {"false", "0", "no"}


class LTX2LoRA(LoRANetwork):
    """`LoRANetwork` with the methods that trainers of the kohya family call."""

    loraplus_lr_ratio: float | None = None

    def apply_to(
        self,
        text_encoders: object,
        transformer: nn.Module,
        apply_text_encoder: bool = False,
        apply_unet: bool = True,
    ) -> None:
        """Attach to the transformer; the text encoder has no adapters."""
        if apply_unet:
            self.attach(transformer)

    def prepare_optimizer_params(
        self,
        unet_lr: float,
        *,
        audio_lr: float | None = None,
        lr_args: Sequence[tuple[str, float]] = (),
    ) -> tuple[list[dict[str, object]], list[str]]:
        """Parameter groups and their names (06 section 6.4)."""
        rates = LearningRates(unet_lr, audio_lr, tuple(lr_args), self.loraplus_lr_ratio)
        named = ((name, self.get_submodule(name)) for name in self.paths)
        return parameter_groups(named, rates)

    def save_weights(
        self, file: str | os.PathLike, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the kohya form; `dtype` None keeps the parameters' own."""
        save_original(file, self.matrices(), metadata or {}, dtype)

    def load_weights(self, file: str | os.PathLike) -> str:
        """Start from a file of any format and say what was loaded."""
        lora = load_lora(file)
        self.load(lora)
        return f"{len(lora.modules)} modules of {file} ({lora.format})"

    def apply_max_norm_regularization(
        self, max_norm_value: float, device: object = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(modules scaled, average norm, largest norm) after shrinking, as 0-d tensors."""
        found = self.scale_weight_norms(max_norm_value)
        return found["keys_scaled"], found["average_key_norm"], found["max_key_norm"]

    def describe(self) -> str:
        """Adapters per group and trainable parameters, for the start-up log."""
        return describe(dict.fromkeys(self.paths.values()), self.parameter_count)


def create_network(
    multiplier: float,
    dim: int | None,
    alpha: float | None,
    vae: object,
    text_encoders: object,
    transformer: nn.Module,
    neuron_dropout: float | None = None,
    *,
    mode: str = "av",
    preset: str = "t2v",
    seed: int = 0,
    **network_args: str,
) -> LTX2LoRA:
    """Fresh adapters on the layers that preset, patterns and mode choose; not attached yet.

    Args:
        dim, alpha: rank (default 32) and alpha (None or 0: equal to the rank).
        vae, text_encoders: part of the protocol, unused.
        neuron_dropout: element dropout of down(x).
        mode, preset, seed: what the trainer knows and the protocol has no place for.
        network_args: the text values of --network_args.

    Raises:
        UserError: see `parse_arguments` and `targets.select_layers`.
    """
    found = parse_arguments(network_args)
    network = LTX2LoRA(
        select_layers(transformer, targets_of(network_args, mode, preset)),
        dim or 32,
        alpha,
        dropouts=_dropouts(neuron_dropout, found),
        multiplier=multiplier,
        seed=seed,
    )
    return _finish(network, found)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike | LoRAFile,
    vae: object,
    text_encoders: object,
    transformer: nn.Module,
    neuron_dropout: float | None = None,
    *,
    mode: str = "av",
    **network_args: str,
) -> LTX2LoRA:
    """A network whose layers, ranks, alphas and values come from a file of any format; not attached yet.

    Layers of the blocks that do not run in `mode` are left out.
    """
    found = parse_arguments(network_args)
    lora = file if isinstance(file, LoRAFile) else load_lora(file, table_of(transformer))
    if mode != "av":
        running = {path: m for path, m in lora.modules.items() if runs_in(group_of(path), mode)}
        lora = dataclasses.replace(lora, modules=running)
    network = LTX2LoRA.from_file(
        transformer,
        lora,
        multiplier=multiplier,
        dropouts=_dropouts(neuron_dropout, found),
    )
    return _finish(network, found)


def targets_of(network_args: Mapping[str, str], mode: str, preset: str) -> Targets:
    """What --network_args, mode and preset select."""
    found = parse_arguments(network_args)
    return Targets(mode, preset, found.get("include_patterns"), found.get("exclude_patterns", ()))


def _finish(network: LTX2LoRA, found: Mapping[str, object]) -> LTX2LoRA:
    network.loraplus_lr_ratio = found.get("loraplus_lr_ratio")
    if found.get("verbose"):
        for path, adapter in network.adapters():
            logger.info("%s: rank %d, alpha %g", path, adapter.rank, adapter.alpha_value)
    return network


def parse_arguments(arguments: Mapping[str, str]) -> dict[str, object]:
    """Typed values of --network_args.

    Raises:
        UserError: unknown key (the known ones are listed) or a value of the wrong form.
    """
    values: dict[str, object] = {}
    for key, text in arguments.items():
        if key in WITHOUT_EFFECT:
            continue
        if key not in ARGUMENTS:
            raise UserError(
                f"--network_args {key}: unknown key{did_you_mean(key, ARGUMENTS)}; known are {', '.join(ARGUMENTS)}"
            )
        values[key] = _value(key, text)
    return values


def _value(key: str, text: str) -> object:
    if key.endswith("_patterns"):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
        if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
            raise UserError(f"--network_args {key}={text}: expected a list such as \"['.*\\.to_k$','.*\\.to_q$']\"")
        return tuple(found)
    if key == "verbose":
        if text.lower() not in _TRUE | _FALSE:
            raise UserError(f"--network_args {key}={text}: expected true or false")
        return text.lower() in _TRUE
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if key.endswith("_dropout") and not 0 <= number < 1:
        raise UserError(f"--network_args {key}={text}: expected a number from 0 up to, not including, 1")
    if key == "loraplus_lr_ratio" and not 0 <= number < float("inf"):
        raise UserError(f"--network_args {key}={text}: expected a number of at least 0")
    return number


def _dropouts(element: float | None, found: Mapping[str, object]) -> Dropouts:
    return Dropouts(element or 0.0, found.get("rank_dropout", 0.0), found.get("module_dropout", 0.0))
