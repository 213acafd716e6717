"""The network group of the training scripts (08 section 5.3)."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

from ltx2_tuner.cli.key_values import parse_key_values
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.options import BUILT_IN, LYCORIS, NetworkOptions
from ltx2_tuner.lora.targets import PRESETS, STRATEGIES, default_preset

logger = logging.getLogger(__name__)
DEFAULT_DIM = 32
# The fork's later name of a strategy and preset.
STRATEGY_ALIASES = {"audio_ref_ic": "audio_ref_only_ic"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group; defaults that the run has to be told about are None here and settled by `network_options`."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--network_module", default=BUILT_IN, help="module that makes the network; also lycoris.kohya")
    add("--network_dim", type=int, help=f"rank (default {DEFAULT_DIM})")
    add("--network_alpha", type=float, help="the adapter's scale is alpha/dim (default: equal to --network_dim)")
    add("--network_dropout", type=float, metavar="P", help="share of the adapter's inner values dropped in training")
    add(
        "--network_args",
        nargs="*",
        metavar="KEY=VALUE",
        help="include_patterns, exclude_patterns, loraplus_lr_ratio, rank_dropout, module_dropout, verbose; "
        "for lycoris.kohya its own keys",
    )
    add(
        "--lora_target_preset",
        type=strategy_name,
        choices=list(PRESETS),
        help="layers that get an adapter (default: t2v, in audio mode audio)",
    )
    add(
        "--ic_lora_strategy",
        type=strategy_name,
        choices=STRATEGIES,
        default="auto",
        help="reference training; auto: preset's",
    )
    add("--lycoris_config", type=Path, metavar="FILE", help="LyCORIS settings (.toml), for lycoris.kohya")
    add("--init_lokr_norm", type=float, help="start scale of LoKr's second factor, for lycoris.kohya algo=lokr")
    add("--network_weights", type=Path, metavar="FILE", help="LoRA file of any format to start from")
    add("--dim_from_weights", action="store_true", help="layers, ranks and alphas come from --network_weights")
    add("--scale_weight_norms", type=float, metavar="N", help="shrink adapters whose norm exceeds N after each step")
    add("--base_weights", type=Path, nargs="*", metavar="FILE", help="LoRA files merged into the model before training")
    add("--base_weights_multiplier", type=float, nargs="*", metavar="M", help="their strengths (default 1.0 each)")
    add("--training_comment", help="text for the saved metadata")
    add("--no_metadata", action="store_true", help="save only the metadata that loaders need")


def network_options(args: argparse.Namespace, mode: str, errors: list[str]) -> NetworkOptions:
    """The group as options.

    Args:
        mode: video, av or audio.
        errors: a sentence is added for each mistake; with any, the options are not to be used.
    """
    before = len(errors)
    network_args = parse_key_values(args.network_args, "--network_args", errors)
    dim = DEFAULT_DIM if args.network_dim is None else args.network_dim
    alpha = float(dim) if not args.network_alpha else args.network_alpha
    options = NetworkOptions(
        module=args.network_module,
        dim=dim,
        alpha=alpha,
        dropout=args.network_dropout,
        args=network_args,
        preset=default_preset(mode, args.ic_lora_strategy, args.lora_target_preset),
        weights=args.network_weights,
        dim_from_weights=args.dim_from_weights,
        scale_weight_norms=args.scale_weight_norms,
        base_weights=_base_weights(args, errors),
        lycoris_config=args.lycoris_config,
        init_lokr_norm=args.init_lokr_norm,
    )
    errors += _number_errors(options)
    errors += _file_errors(options)
    errors += _module_errors(options)
    errors += _strategy_errors(args.ic_lora_strategy, mode)
    if len(errors) == before:
        _say(args, options)
    return options


def strategy_name(text: str) -> str:
    """A strategy or preset by its present name."""
    return STRATEGY_ALIASES.get(text, text)


def _base_weights(args: argparse.Namespace, errors: list[str]) -> tuple[tuple[Path, float], ...]:
    paths, multipliers = args.base_weights or [], args.base_weights_multiplier or []
    if len(multipliers) > len(paths):
        errors.append(
            f"--base_weights_multiplier has {len(multipliers)} values for {len(paths)} --base_weights; give one each"
        )
    return tuple(zip(paths, [*multipliers, *[1.0] * len(paths)]))


def _number_errors(options: NetworkOptions) -> list[str]:
    errors = []
    if options.dim < 1:
        errors.append(f"--network_dim {options.dim}: the rank is at least 1")
    elif not 0 < options.alpha < float("inf"):
        errors.append(f"--network_alpha {options.alpha:g}: give a number above 0, usually that of --network_dim")
    if options.dropout is not None and not 0 <= options.dropout < 1:
        errors.append(f"--network_dropout {options.dropout:g}: give a number from 0 up to, not including, 1")
    if options.scale_weight_norms is not None and not 0 < options.scale_weight_norms < float("inf"):
        errors.append(f"--scale_weight_norms {options.scale_weight_norms:g}: give a number above 0, such as 1")
    return errors


def _file_errors(options: NetworkOptions) -> list[str]:
    errors = []
    if options.dim_from_weights and options.weights is None:
        errors.append("--dim_from_weights needs --network_weights FILE")
    files = [("--network_weights", options.weights), ("--lycoris_config", options.lycoris_config)]
    files += [("--base_weights", path) for path, _ in options.base_weights]
    errors += [f"{flag} {path}: no such file" for flag, path in files if path is not None and not path.is_file()]
    return errors


def _module_errors(options: NetworkOptions) -> list[str]:
    errors = []
    if options.is_built_in:
        from networks.lora_ltx2 import parse_arguments

        try:
            parse_arguments(options.args)
        except UserError as error:
            errors.append(str(error))
    elif not _is_installed(options.module):
        remedy = "pip install lycoris-lora" if options.module.startswith("lycoris") else "check its spelling"
        errors.append(f"--network_module {options.module}: no such module; {remedy}")
    if not options.is_lycoris:
        if options.lycoris_config is not None:
            errors.append(f"--lycoris_config needs --network_module {LYCORIS}")
        if options.init_lokr_norm is not None:
            errors.append(f"--init_lokr_norm needs --network_module {LYCORIS} with algo=lokr")
    return errors


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _strategy_errors(strategy: str, mode: str) -> list[str]:
    if strategy == "v2v" and mode != "video":
        return [f"--ic_lora_strategy v2v: v2v training is video-only; use --ltx2_mode video, not {mode}"]
    if strategy == "audio_ref_only_ic" and mode == "video":
        return ["--ic_lora_strategy audio_ref_only_ic needs sound; use --ltx2_mode av or audio"]
    return []


def _say(args: argparse.Namespace, options: NetworkOptions) -> None:
    if options.dim_from_weights:
        logger.info("--dim_from_weights: layers, ranks and alphas come from %s", options.weights)
        return
    if args.network_dim is None:
        logger.info("--network_dim is not given: rank %d", options.dim)
    if not args.network_alpha:
        logger.info("--network_alpha is not given: %g, as the rank (scale 1)", options.alpha)
    elif options.alpha != options.dim:
        level = logging.WARNING if options.alpha < options.dim else logging.INFO
        message = "--network_alpha %g with --network_dim %d: the adapters' effective scale is %g"
        logger.log(level, message, options.alpha, options.dim, options.alpha / options.dim)
    if args.lora_target_preset and not options.is_built_in:
        logger.warning("--lora_target_preset has no effect with --network_module %s", options.module)
    elif args.lora_target_preset and "include_patterns" in options.args:
        logger.warning("include_patterns replace --lora_target_preset %s", args.lora_target_preset)
    if options.is_lycoris:
        logger.warning(
            "LyCORIS runs on this model are reported to be unstable: watch grad_norm/total and loss/average, and lower "
            "--learning_rate when they grow"
        )
    if options.is_lycoris and "include_patterns" in options.args:
        logger.warning("include_patterns are the built-in LoRA's; LyCORIS chooses layers by its own settings")
    unused = sorted({"conv_dim", "conv_alpha"} & options.args.keys())
    if options.is_built_in and unused:
        logger.info("--network_args %s: this model has no convolutions, so they do nothing", ", ".join(unused))
