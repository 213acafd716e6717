"""What a run will need on the device, worked out before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import torch

from ltx2_tuner.data.batches import TrainingData
from ltx2_tuner.lora.options import NetworkOptions
from ltx2_tuner.lora.targets import Targets, select_layers
from ltx2_tuner.memory.activations import BatchShape, boundary_bytes, forward_operations, kept_bytes
from ltx2_tuner.memory.options import CompileOptions
from ltx2_tuner.memory.planner import Footprint, Plan, settle
from ltx2_tuner.memory.sizes import weight_sizes
from ltx2_tuner.memory.speed import measure_speed
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization.formats import WeightFormat

if TYPE_CHECKING:
    from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig

logger = logging.getLogger(__name__)

_SHARE = 0.95  # of the free memory; the rest is for what other programs take meanwhile
_HOST_SHARE = 0.5  # of the host's free memory
_TEXT_TOKENS = 1024  # of a cached prompt
_GB = 1e9
_APART = 1.1  # dense weights by themselves: about what joint products save of a step (docs/lab-notes.md)
_EXPANDING, _FP8_PRODUCTS = 1.07, 0.77  # time of a step with such weights, bf16's is 1 (docs/benchmarks.md)
_CONTEXT = 0.5e9  # bytes that CUDA itself takes, outside of the allocator
_STATIC_SHAPES = 3  # batch shapes that are worth a compilation each
_CROWDED = 2**30  # bytes that other programs may have before they are mentioned


def plan_memory(config: TrainingConfig, sources: Sources, processes: Processes) -> Plan | None:
    """How the largest batch fits; None where nothing has to be chosen: on the CPU, unless a budget was typed."""
    options, device = config.memory, processes.device
    if device.type != "cuda" and options.budget_gb is None:
        return None
    budget = (options.budget_gb or 0) * _GB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if total - free > _CROWDED:
            logger.warning("other programs use %.1f GiB of the GPU's memory", (total - free) / 2**30)
        if budget:
            # A budget is kept: the allocator stops at it, and so the rehearsal proves it.
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget - _CONTEXT, 0) / total), device)
        budget = min(budget, free) if budget else free * _SHARE
    plan = settle(
        options,
        estimate(config, sources, processes.peers.count if options.shard_base else 1),
        budget,
        measure_speed(device),
        host=spare_host_memory() / processes.peers.count,
    )
    (logger.info if plan.fits else logger.warning)("%s", plan.table)
    return plan


def estimate(config: TrainingConfig, sources: Sources, shards: int = 1) -> Footprint:
    """Bytes of weights, adapters and the largest batch's activations, and the work of a step.

    Args:
        shards: processes that the blocks are spread over.
    """
    variant = {"video": "video", "av": "av", "audio": "audio" if config.audio_only_model else "av"}[config.mode]
    with torch.device("meta"):
        model = LTXTransformer(sources.model, variant)
    shape, samples = largest_batch(config, sources.training)[1:]
    needed = footprint_of(
        model,
        config.precision.weights,
        config.dtype,
        _adapter_values(model, config.network, config.trained_mode),
        config.adapter_dtype,
        config.optimizer.type,
        shape,
        samples,
    )
    waits = config.loop.accumulation > 1 or config.regularizers.preservation.active
    passing = needed.passing if config.network.is_built_in else needed.gradients  # others have no working copies
    return replace(needed, gradients_wait=waits, passing=passing, shards=shards)


def footprint_of(
    model: LTXTransformer,
    weights: WeightFormat,
    dtype: torch.dtype,
    values: int,
    adapter_dtype: torch.dtype,
    optimizer: str,
    shape: BatchShape,
    samples: int,
) -> Footprint:
    """What a step needs.

    Args:
        model: on the meta device will do.
        weights, dtype: what the blocks' matrices are stored in, and what they multiply in.
        values: that are trained.
        optimizer: its name.
        shape, samples: of the batch.
    """
    sizes = weight_sizes(model, weights, dtype)
    copies = dtype.itemsize if dtype != adapter_dtype else 0
    return Footprint(
        blocks=sizes.blocks,
        block=sizes.block,
        rest=sizes.rest,
        trained=values * (adapter_dtype.itemsize + copies) + moment_bytes(optimizer, values, adapter_dtype.itemsize),
        gradients=values * adapter_dtype.itemsize,
        passing=values * dtype.itemsize,
        kept=kept_bytes(model.config, shape, dtype.itemsize),
        boundary=boundary_bytes(model.config, shape, dtype.itemsize),
        expanded=sizes.expanded,
        forward=forward_operations(model.config, shape, samples) * _effort(weights),
        apart=_apart(weights),
    )


def spare_host_memory() -> float:
    """Bytes of the host for blocks that could stay on the device."""
    return _HOST_SHARE * psutil.virtual_memory().available


def _apart(weights: WeightFormat) -> float:
    """How many times as long products take with weights that come and go: those that are expanded are joined anyway."""
    return 1.0 if weights.kind in ("fp8", "nf4") and not weights.fp8_compute else _APART


def _effort(weights: WeightFormat) -> float:
    """How long arithmetic takes, in what it takes with bf16 weights."""
    if weights.fp8_compute:
        return _FP8_PRODUCTS
    return _EXPANDING if weights.kind in ("fp8", "nf4") else 1.0


def moment_bytes(optimizer: str, values: int, itemsize: int) -> int:
    """Of an optimizer's averages, by its name: Adam and its relatives keep two values for each one that is trained."""
    name = optimizer.rpartition(".")[2].lower()
    if "paged" in name or "adafactor" in name or name == "sgd":
        return 0
    each = 1 if "8bit" in name else itemsize
    return values * each * (1 if name.startswith(("lion", "muon")) else 2)


def _adapter_values(model: LTXTransformer, network: NetworkOptions, mode: str) -> int:
    """Trainable values of the built-in LoRA; other modules are taken to be as large as it with the preset."""
    layers = select_layers(model, Targets(mode, network.preset, None, ()))
    return sum(network.dim * (layer.in_features + layer.out_features) for layer in layers.values())


def largest_batch(config: TrainingConfig, data: TrainingData) -> tuple[int, BatchShape, int]:
    """Number (in epoch 0), tokens and samples of the batch that needs most memory."""
    shapes = enumerate(batch_shapes(config, data))
    found = max(shapes, key=lambda each: 2 * each[1][0].video + each[1][0].audio, default=(0, (BatchShape(0, 0, 0), 1)))
    return found[0], *found[1]


def batch_shapes(config: TrainingConfig, data: TrainingData) -> Iterator[tuple[BatchShape, int]]:
    """Tokens and samples of each batch of epoch 0."""
    references = 1 + config.modes.reference_downscale**-2 if config.strategy == "v2v" else 1
    for number in range(len(data) if isinstance(data, TrainingData) else 0):
        items = data.batch_items(0, number)
        video = audio = 0
        if config.mode != "audio":
            _, frames, height, width = items[0].latent_shape
            video = round(frames * height * width * references) * len(items)
        if config.trained_mode != "video":
            audio = max((item.audio_steps or 0) for item in items) * len(items)
        yield BatchShape(video, audio, _TEXT_TOKENS * len(items)), len(items)


def suited(options: CompileOptions, shapes: int) -> CompileOptions:
    """How blocks are compiled for batches of so many shapes, unless the user has said it.

    Compiling takes its time for each shape. Code for any number of tokens takes more than half as long again, once, and
    is a little slower.
    """
    if options.dynamic_typed or shapes <= _STATIC_SHAPES:
        return options
    return replace(options, dynamic=True)


def settled(config: TrainingConfig, plan: Plan | None) -> TrainingConfig:
    """The configuration with what the plan says, or with what was typed where there is none."""
    memory = config.memory
    if plan is not None:
        memory = plan.options
    else:
        memory = replace(memory, blocks_to_swap=memory.blocks_to_swap or 0, checkpointing=bool(memory.checkpointing))
    return replace(config, memory=memory)
