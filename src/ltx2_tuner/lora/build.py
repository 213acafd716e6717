"""The network a run trains, from whatever module `--network_module` names (kohya protocol)."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.files import read_tensors
from ltx2_tuner.lora.network import LoRANetwork
from ltx2_tuner.lora.options import NetworkOptions
from ltx2_tuner.lora.targets import adapts

logger = logging.getLogger(__name__)


def build_network(
    transformer: nn.Module,
    options: NetworkOptions,
    *,
    mode: str,
    seed: int,
    quantised: bool = False,
    start_values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> nn.Module:
    """Create the network, attach it, load what it starts from, and log what it is.

    Args:
        transformer: frozen; its linear layers are where they will be trained (device and precision).
        mode: video, av or audio.
        seed: of the run; the built-in network's start values depend on it and on each layer's name.
        quantised: the frozen layers are fp8 or nf4 (LyCORIS has to know).
        start_values: LoftQ's, by layer path; `--network_weights` wins over them.

    Raises:
        UserError: missing package, arguments the module refuses, no layer, weights that do not fit.
    """
    if options.is_built_in:
        network = _built_in(transformer, options, mode, seed)
    else:
        if options.is_lycoris:
            from ltx2_tuner.lora.lycoris import create_lycoris

            network = create_lycoris(transformer, options, mode=mode, seed=seed, quantised=quantised)
        else:
            network = _by_protocol(transformer, options)
        _move(network, transformer)
        network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
        if options.weights is not None:
            _load_foreign(network, options)
    if isinstance(network, LoRANetwork):
        if start_values is not None:
            _start(network, options, start_values)
        _log_built_in(network, options, mode)
    return network


def target_of(options: NetworkOptions, mode: str) -> Callable[[str], bool]:
    """Whether a layer, by its path, gets an adapter of the built-in network: known before any weight is read.

    Raises:
        UserError: as `build_network`, for the patterns.
    """
    from networks.lora_ltx2 import targets_of

    return adapts(targets_of(options.args, mode, options.preset))


def optimizer_groups(
    network: nn.Module,
    learning_rate: float,
    audio_learning_rate: float | None = None,
    lr_args: Sequence[tuple[str, float]] = (),
) -> tuple[list[dict[str, object]], list[str]]:
    """Optimizer groups (`params`, `lr`) of any network module, and their names for the logs.

    Raises:
        UserError: `--audio_lr` or `--lr_args` with a network whose own `prepare_optimizer_params` lacks them.
    """
    prepare = network.prepare_optimizer_params
    keywords: dict[str, object] = {"unet_lr": learning_rate}
    special = {"audio_lr": audio_learning_rate, "lr_args": tuple(lr_args)}
    accepted = inspect.signature(prepare).parameters
    for name, value in special.items():
        if value is None or value == ():
            continue
        if name not in accepted:
            raise UserError(f"--{name} is for the built-in LoRA only; leave it out with this --network_module")
        keywords[name] = value
    found = prepare(**keywords)
    groups, names = found if isinstance(found, tuple) else (found, [])
    groups = [{**group, "params": list(group["params"])} for group in groups]
    return groups, list(names) or ["unet"] * len(groups)


def _built_in(transformer: nn.Module, options: NetworkOptions, mode: str, seed: int) -> LoRANetwork:
    from networks import lora_ltx2

    if options.dim_from_weights:
        network = lora_ltx2.create_network_from_weights(
            1.0, options.weights, None, None, transformer, options.dropout, mode=mode, **options.args
        )
        logger.info("--network_weights: %d layers from %s", len(network.paths), options.weights)
    else:
        network = lora_ltx2.create_network(
            1.0,
            options.dim,
            options.alpha,
            None,
            None,
            transformer,
            options.dropout,
            mode=mode,
            preset=options.preset,
            seed=seed,
            **options.args,
        )
        if options.weights is not None:
            logger.info("--network_weights: %s", network.load_weights(options.weights))
    _move(network, transformer)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    return network


def _load_foreign(network: nn.Module, options: NetworkOptions) -> None:
    """Start values for another network module, by its own reader.

    Raises:
        UserError: none of the file's tensors is one of the network's.
    """
    found, wanted = set(read_tensors(options.weights)[0]), set(network.state_dict())
    if not found & wanted:
        raise UserError(
            f"--network_weights {options.weights}: none of its {len(found)} tensors belongs to this "
            f"{options.module} network; give a file that it has saved with these --network_args"
        )
    network.load_weights(str(options.weights))
    logger.info("--network_weights: %d of %d tensors from %s", len(found & wanted), len(wanted), options.weights)


def _start(network: LoRANetwork, options: NetworkOptions, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    if options.weights is not None:
        logger.warning("--network_weights wins over --loftq_init: LoftQ's start values are not used")
        return
    count = network.start_from(values)
    logger.info("LoftQ: %d of %d adapters start from what nf4 loses; the LoRA contains it", count, len(network.paths))


def _by_protocol(transformer: nn.Module, options: NetworkOptions) -> nn.Module:
    module = import_module(options.module)
    arguments = dict(options.args)
    if options.dropout is not None:
        arguments["neuron_dropout"] = options.dropout
    if options.dim_from_weights:
        found = module.create_network_from_weights(1.0, str(options.weights), None, None, transformer, **arguments)
        return found[0] if isinstance(found, tuple) else found
    return module.create_network(1.0, options.dim, options.alpha, None, None, transformer, **arguments)


def import_module(name: str):
    """The network module.

    Raises:
        UserError: it is not installed, with the pip line for LyCORIS.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        remedy = "pip install lycoris-lora" if name.startswith("lycoris") else "check its spelling"
        raise UserError(f"--network_module {name}: no module {error.name}; {remedy}") from error


def _move(network: nn.Module, transformer: nn.Module) -> None:
    """To the device of the transformer's parameters; a block-streamed one keeps those outside the blocks there."""
    network.to(next((p.device for p in transformer.parameters()), torch.device("cpu")))


def _log_built_in(network: LoRANetwork, options: NetworkOptions, mode: str) -> None:
    logger.info("%s", network.describe())
    if not options.dim_from_weights and options.preset == "full" and "include_patterns" not in options.args:
        gates = sum(path.endswith(".to_gate_logits") for path in network.paths.values())
        if gates:
            logger.warning("preset full includes %d gate projections; users reported worse results than t2v", gates)
    if not any("audio_" in path for path in network.paths.values()):
        if mode == "audio":
            raise UserError("audio mode, but no adapter is on a sound layer; use --lora_target_preset audio")
        if mode == "av":
            logger.warning("no adapter is on a sound layer: sound will not be learned")
