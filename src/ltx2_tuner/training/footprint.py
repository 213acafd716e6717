"""What a run will need on the device, worked out before any weight is read."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ltx2_tuner.data.batches import TrainingData
from ltx2_tuner.lora.options import NetworkOptions
from ltx2_tuner.lora.targets import Targets, select_layers
from ltx2_tuner.memory.options import MemoryOptions
from ltx2_tuner.memory.planner import Footprint, settle
from ltx2_tuner.memory.sizes import weight_sizes
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig

if TYPE_CHECKING:
    from ltx2_tuner.training.build import Sources, TrainingConfig

logger = logging.getLogger(__name__)

_TRAINED_BYTES = 16  # per adapter value: float32 value, gradient and two moments
_SHARE = 0.95  # of the free memory; the rest is for what other programs take meanwhile


def plan_memory(config: TrainingConfig, sources: Sources, device: torch.device) -> MemoryOptions:
    """The memory options with everything settled that was not typed. On the CPU nothing is streamed by itself."""
    options = config.memory
    if device.type != "cuda":
        return replace(options, blocks_to_swap=options.blocks_to_swap or 0, checkpointing=bool(options.checkpointing))
    free, total = torch.cuda.mem_get_info(device)
    if total - free > 2**30:
        logger.warning("other programs use %.1f GiB of the GPU's memory", (total - free) / 2**30)
    budget = free * _SHARE if options.budget_gb is None else options.budget_gb * 1e9
    settled, line = settle(options, estimate(config, sources), budget)
    logger.info("%s", line)
    return settled


def estimate(config: TrainingConfig, sources: Sources) -> Footprint:
    """Bytes of weights, adapters and the largest batch's hidden states."""
    variant = {"video": "video", "av": "av", "audio": "audio" if config.audio_only_model else "av"}[config.mode]
    with torch.device("meta"):
        model = LTXTransformer(sources.model, variant)
    sizes = weight_sizes(model, config.precision.weights, config.dtype)
    return Footprint(
        blocks=sizes.blocks,
        block=sizes.block,
        rest=sizes.rest,
        trained=_adapter_values(model, config.network, config.mode) * _TRAINED_BYTES,
        hidden=largest_hidden(sources.training, sources.model, config.mode, config.dtype),
    )


def _adapter_values(model: LTXTransformer, network: NetworkOptions, mode: str) -> int:
    """Trainable values of the built-in LoRA; other modules are taken to be as large as it with the preset."""
    layers = select_layers(model, Targets(mode, network.preset, None, ()))
    return sum(network.dim * (layer.in_features + layer.out_features) for layer in layers.values())


def largest_hidden(data: TrainingData, model: TransformerConfig, mode: str, dtype: torch.dtype) -> int:
    """Bytes of the hidden states, both streams, of the batch that has most."""
    largest = 0
    for number in range(len(data)):
        items = data.batch_items(0, number)
        values = 0
        if mode != "audio":
            _, frames, height, width = items[0].latent_shape
            values += frames * height * width * model.video_width
        if mode != "video":
            values += max((item.audio_steps or 0) for item in items) * model.audio_width
        largest = max(largest, values * len(items))
    return largest * dtype.itemsize
