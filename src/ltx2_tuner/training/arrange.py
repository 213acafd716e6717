"""The frozen model with its adapters, loaded and made ready for training passes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ltx2_tuner.checkpoint.base_model import BaseModel, load_base_model
from ltx2_tuner.checkpoint.transformer_loader import OnBlock
from ltx2_tuner.lora.build import build_network, target_of
from ltx2_tuner.memory.compilation import compiled, compiler_made_ready
from ltx2_tuner.memory.compile_cache import keep_compilations
from ltx2_tuner.memory.planner import Plan
from ltx2_tuner.memory.prepare import host_blocks
from ltx2_tuner.memory.sharding import BlockShards
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.training.base_weights import merge_base_weights
from ltx2_tuner.training.footprint import batch_shapes, suited
from ltx2_tuner.training.loftq import LoftQStart, keep_start
from ltx2_tuner.training.rehearsal import Arrangement
from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig

logger = logging.getLogger(__name__)

MIXED_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Arranged:
    """The frozen model with its adapters, ready for training passes. loftq: what its adapters started from."""

    model: LTXTransformer
    network: nn.Module
    arrangement: Arrangement
    loftq: LoftQStart | None


def arrange(
    config: TrainingConfig, sources: Sources, processes: Processes, plan: Plan | None, *, stays: bool
) -> Arranged:
    """Load the weights and put the adapters on them.

    Args:
        config: with the memory options that the plan has settled.
        stays: as `Arrangement` takes it.
    """
    device = processes.device
    shards = BlockShards(processes.peers, device) if config.memory.shard_base else None
    hosts = host_blocks(sources.model.num_layers, config.memory, device)
    keeper = shards or hosts
    compiles = compiled(config.compilation, device) and config.compilation.backend == "inductor"
    if compiles:
        keep_compilations()
    with compiler_made_ready(compiles):
        base = _load_model(config, sources, device, None if keeper is None else keeper.take)
    model = base.transformer
    network = build_network(
        model,
        config.network,
        mode=config.trained_mode,
        seed=config.loop.seed,
        quantised=config.precision.weights.kind != "dense",
        start_values=base.start_values,
    )
    network.to(device, config.adapter_dtype)
    loftq = _keep_start(config, base, network, processes)
    shapes = len(set(batch_shapes(config, sources.training)))
    compilation = suited(config.compilation, shapes)
    dtype = MIXED_PRECISION.get(config.mixed_precision, config.dtype)
    arrangement = Arrangement(
        model, network, config.memory, compilation, device, dtype, plan, shards, hosts, stays=stays
    )
    logger.info("%s", arrangement.prepared)
    if arrangement.prepared.compiled and compilation != config.compilation:
        logger.info("%d batch shapes: code is compiled once for all of them", shapes)
    return Arranged(model, network, arrangement, loftq)


def _load_model(config: TrainingConfig, sources: Sources, device: torch.device, on_block: OnBlock | None) -> BaseModel:
    """The frozen transformer; only the parts that the mode runs, where that is possible.

    Args:
        on_block: called with each block (index, block) when it is loaded.
    """
    variant = {"video": "video", "av": "av", "audio": "audio" if config.audio_only_model else "av"}[config.mode]
    base_weights = merge_base_weights(config.network.base_weights)
    base = load_base_model(
        sources.checkpoint,
        variant,
        device,
        config.dtype,
        config.precision,
        transform=base_weights,
        adapted=target_of(config.network, config.trained_mode) if config.precision.loftq_rank else lambda _layer: True,
        on_block=on_block,
    )
    if base_weights is not None:
        base_weights.check_used()
    return base


def _keep_start(config: TrainingConfig, base: BaseModel, network: nn.Module, processes: Processes) -> LoftQStart | None:
    """What LoftQ's adapters start from, written beside the output; None without LoftQ."""
    if base.start_values is None:
        return None
    path = config.save.output_dir / f"{config.save.output_name}.loftq_init.safetensors"
    return keep_start(network, base.start_values, config.precision, path if processes.is_main else None)
