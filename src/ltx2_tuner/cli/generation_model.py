"""The transformer of ltx2_generate_video.py: its flags of precision, memory and attention, its LoRAs."""

from __future__ import annotations

import argparse
import dataclasses
import logging

import torch

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.base_model import load_base_model
from ltx2_tuner.checkpoint.precision import PrecisionOptions
from ltx2_tuner.checkpoint.precision import check as check_precision
from ltx2_tuner.cli.arguments_memory import (
    add_attention_arguments,
    add_memory_arguments,
    add_weight_arguments,
    check_memory,
    compile_options,
    memory_options,
    precision_options,
)
from ltx2_tuner.cli.parser import Parser
from ltx2_tuner.lora import LoRANetwork, load_lora, table_of
from ltx2_tuner.lora.targets import compile_patterns, takes
from ltx2_tuner.memory.options import MemoryOptions
from ltx2_tuner.memory.planner import Footprint, settle
from ltx2_tuner.memory.prepare import check_streamed, host_blocks, prepare_model
from ltx2_tuner.memory.sizes import weight_sizes
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig

logger = logging.getLogger(__name__)

ATTENTION_MODES = {
    "torch": "sdpa",
    "sdpa": "sdpa",
    "flash": "flash_attn",
    "flash2": "flash_attn",
    "flash3": "flash3",
    "xformers": "xformers",
    "sageattn": "sage_attn",
}
# Hidden states that live at one time without a backward pass, in multiples of one.
_LIVE_STATES = 24
_SHARE = 0.8  # of the free memory; decoding needs the rest


def add_model_arguments(parser: Parser) -> None:
    """Flags of storage, memory, attention and LoRAs."""
    add_weight_arguments(parser.add_argument_group("precision"))
    add_memory_arguments(parser, training=False)
    add_attention_arguments(parser)
    parser.add_argument("--attn_mode", choices=tuple(ATTENTION_MODES), help="other spelling of the attention flags")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_weight", nargs="*", default=(), metavar="FILE", help="LoRA files of any format")
    group.add_argument("--lora_multiplier", nargs="*", type=float, default=(), help="one, or one a file (default 1.0)")
    group.add_argument("--include_patterns", nargs="*", default=(), help="regular expressions: only these layers")
    group.add_argument("--exclude_patterns", nargs="*", default=(), help="regular expressions: without these layers")


def check_model(args: argparse.Namespace) -> list[str]:
    """Everything wrong with these flags; --attn_mode becomes the flag it stands for."""
    errors = []
    if args.attn_mode:
        if any(getattr(args, name) for name in set(ATTENTION_MODES.values())):
            errors.append("--attn_mode and an attention flag say the same thing; keep one")
        setattr(args, ATTENTION_MODES[args.attn_mode], True)
    errors += check_memory(args)
    if len(args.lora_multiplier) not in (0, 1, len(args.lora_weight)):
        errors.append(f"--lora_multiplier needs one value, or {len(args.lora_weight)} for as many --lora_weight files")
    if (args.include_patterns or args.exclude_patterns) and not args.lora_weight:
        errors.append("--include_patterns and --exclude_patterns need --lora_weight")
    if args.blocks_to_swap and args.sample_with_offloading:
        errors.append("--blocks_to_swap keeps the blocks on the host already; drop --sample_with_offloading")
    return errors


def load_model(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
) -> LTXTransformer:
    """The transformer in eval mode with the LoRAs attached, streamed where it does not fit.

    Args:
        tokens: of the largest sample.
    """
    precision = precision_options(args)
    on_cuda = device.type == "cuda"
    device_memory = torch.cuda.get_device_properties(device).total_memory if on_cuda else None
    check_precision(checkpoint, precision, device_memory=device_memory)
    config = TransformerConfig.from_dict(checkpoint.config["transformer"])
    check_streamed(config.num_layers, args.blocks_to_swap)
    memory = _settled(memory_options(args), config, variant, precision, device, dtype, tokens)
    hosts = host_blocks(config.num_layers, memory, device)
    transformer = load_base_model(
        checkpoint,
        variant,
        device,
        dtype,
        precision,
        on_block=None if hosts is None else hosts.take,
    ).transformer
    for path, multiplier in _loras(args):
        _attach(transformer, path, multiplier, args, device)
    compilation = dataclasses.replace(compile_options(args), enabled=bool(args.compile))
    logger.info("%s", prepare_model(transformer, memory, compilation, device, hosts=hosts))
    return transformer.eval()


def _settled(
    options: MemoryOptions,
    config: TransformerConfig,
    variant: str,
    precision: PrecisionOptions,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
) -> MemoryOptions:
    """How many blocks are streamed, where that was not typed."""
    if device.type != "cuda" or options.blocks_to_swap is not None:
        return dataclasses.replace(options, blocks_to_swap=options.blocks_to_swap or 0)
    with torch.device("meta"):
        sizes = weight_sizes(LTXTransformer(config, variant), precision.weights, dtype)
    live = _LIVE_STATES * tokens * config.video_width * dtype.itemsize
    footprint = Footprint(blocks=sizes.blocks, block=sizes.block, rest=sizes.rest + live, trained=0)
    free = torch.cuda.mem_get_info(device)[0]
    budget = options.budget_gb * 1e9 if options.budget_gb else free * _SHARE
    plan = settle(options, footprint, budget, training=False)
    logger.info("%s", plan.table)
    return plan.options


def _loras(args: argparse.Namespace) -> list[tuple[str, float]]:
    multipliers = list(args.lora_multiplier) or [1.0]
    if len(multipliers) == 1:
        multipliers *= len(args.lora_weight)
    return list(zip(args.lora_weight, multipliers))


def _attach(
    transformer: torch.nn.Module, path: str, multiplier: float, args: argparse.Namespace, device: torch.device
) -> None:
    """Put a LoRA file's adapters beside their layers, filtered by the patterns."""
    lora = load_lora(path, table_of(transformer))
    if args.include_patterns or args.exclude_patterns:
        include = compile_patterns(args.include_patterns, "--include_patterns") or None
        exclude = compile_patterns(args.exclude_patterns, "--exclude_patterns")
        kept = {name: module for name, module in lora.modules.items() if takes(name, include, exclude)}
        lora = dataclasses.replace(lora, modules=kept)
    network = LoRANetwork.from_file(transformer, lora, multiplier=multiplier)
    network.to(device).requires_grad_(False).attach(transformer)
    logger.info("%s: %d modules at strength %g", path, len(network.paths), multiplier)
