"""Making the network that is trained, whatever module --network_module names (kohya protocol)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.options import NetworkOptions
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.training.optimizers import OptimizerOptions

logger = logging.getLogger(__name__)


def make_network(
    options: NetworkOptions, model: LTXTransformer, mode: str, seed: int, *, quantised: bool = False
) -> nn.Module:
    """The network, attached to the model, with its start values loaded.

    Raises:
        UserError: the module or its arguments are wrong, or the start file does not fit.
    """
    module = importlib.import_module(options.module)
    arguments: dict[str, object] = dict(options.args)
    if options.is_built_in:
        network = _built_in(module, options, model, mode, seed)
    else:
        if quantised:
            arguments.setdefault("bypass_mode", True)
        network = module.create_network(
            1.0, options.dim, options.alpha, None, None, model, neuron_dropout=options.dropout, **arguments
        )
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    if options.weights is not None and not (options.is_built_in and options.dim_from_weights):
        logger.info("starting from %s", network.load_weights(str(options.weights)))
    network.requires_grad_(True)
    if options.is_built_in:
        logger.info("%s", network.describe())
    _check_audio(network, mode)
    return network


def _built_in(module, options: NetworkOptions, model: LTXTransformer, mode: str, seed: int) -> nn.Module:
    if options.dim_from_weights:
        return module.create_network_from_weights(
            1.0, options.weights, None, None, model, options.dropout, **options.args
        )
    return module.create_network(
        1.0,
        options.dim,
        options.alpha,
        None,
        None,
        model,
        options.dropout,
        mode=mode,
        preset=options.preset,
        seed=seed,
        **options.args,
    )


def _check_audio(network: nn.Module, mode: str) -> None:
    if mode == "video" or any("audio_" in name for name, _ in network.named_parameters()):
        return
    message = f"no adapter is on a sound layer in {mode} mode; choose another --lora_target_preset or include_patterns"
    if mode == "audio":
        raise UserError(message)
    logger.warning("%s", message)


def parameter_groups(network: nn.Module, options: OptimizerOptions) -> tuple[Sequence[Mapping], list[str]]:
    """Optimizer groups and their names.

    Raises:
        UserError: --audio_lr or --lr_args with a network module that has no such groups.
    """
    special = {}
    if options.audio_learning_rate is not None:
        special["audio_lr"] = options.audio_learning_rate
    if options.lr_args:
        special["lr_args"] = options.lr_args
    try:
        found = network.prepare_optimizer_params(unet_lr=options.learning_rate, **special)
    except TypeError as error:
        if not special:
            raise
        raise UserError("--audio_lr and --lr_args work with the built-in LoRA only; drop them") from error
    groups, names = found if isinstance(found, tuple) else (found, None)
    groups = list(groups)
    return groups, list(names) if names else [f"unet_{index}" for index in range(len(groups))]


def trained_parameters(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], list[str]]:
    """Every parameter that the optimizer steps, with its name in the network."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs = [(parameter, name) for name, parameter in network.named_parameters() if id(parameter) in stepped]
    return [parameter for parameter, _ in pairs], [name for _, name in pairs]
