"""Readies a loaded transformer for training: attention, chunking, recomputation, block streaming, compilation."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.attention_check import usable_backend
from ltx2_tuner.memory.compilation import CACHE_ENTRIES, compile_blocks, compiled
from ltx2_tuner.memory.host_blocks import HostBlocks
from ltx2_tuner.memory.offload import ActivationOffload
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.sharding import BlockShards, ShardedStore
from ltx2_tuner.memory.streaming import BlockStore, further_indices, streamed_indices
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization import QuantisedLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """What was set up. store: the streamed blocks, None without; checkpointing: whether blocks are recomputed."""

    store: BlockStore | None
    checkpointing: bool
    compiled: bool

    def __str__(self) -> str:
        parts = ["all blocks on the device"]
        if self.store is not None:
            parts = [str(self.store)]
        parts.append("activations recomputed" if self.checkpointing else "activations kept")
        parts.append("blocks compiled" if self.compiled else "not compiled")
        return "plan: " + ", ".join(parts)


def check_streamed(blocks: int, count: int | None) -> None:
    """Refuse to stream more blocks than can be.

    Raises:
        UserError: no block would be left.
    """
    if count is not None and count > blocks - 1:
        raise UserError(
            f"blocks_to_swap must be at most {blocks - 1} (the model has {blocks} blocks), got {count}; lower it"
        )


def host_blocks(blocks: int, options: MemoryOptions, device: torch.device) -> HostBlocks | None:
    """What takes streamed blocks to the host while they are loaded; None where none is streamed."""
    if not options.blocks_to_swap:
        return None
    return HostBlocks(streamed_indices(blocks, options.blocks_to_swap), device, options.pinned)


def prepare_model(
    model: LTXTransformer,
    options: MemoryOptions,
    compilation: CompileOptions,
    device: torch.device,
    shards: BlockShards | None = None,
    hosts: HostBlocks | None = None,
) -> MemoryPlan:
    """Apply the options to a model whose adapters are attached.

    Args:
        shards: what took the matrices of all blocks while they were loaded, for a sharded model.
        hosts: what took those of streamed blocks while they were loaded.
    """
    compiles = compiled(compilation, device)
    model.blocks_alike, model.any_length = compiles, compiles and compilation.dynamic is not False
    model.set_attention_backend(usable_backend(options.attention, device))
    if options.split_attention != "none":
        model.split_attention(options.split_attention, options.split_mode or "batch", options.split_chunk)
    if options.ffn_chunk_size:
        model.chunk_feed_forward(options.ffn_chunk_target, options.ffn_chunk_size)
    if shards is None:
        store = _stream(model, options, device, None, hosts)
    else:
        store = ShardedStore(model.transformer_blocks, shards, device, ring=options.ring)
        model.block_runner = store
    _recompute(model, options, device)
    if compiles:
        _compile(model, compilation)
    elif compilation.enabled is None and device.type == "cuda":
        logger.info("no compiler back end (Triton) here: blocks are not compiled")
    return MemoryPlan(store, bool(options.checkpointing), compiles)


def rearrange(model: LTXTransformer, plan: MemoryPlan, options: MemoryOptions, device: torch.device) -> MemoryPlan:
    """Recompute and stream as `options` now say; what is compiled stays so. Call it between two passes."""
    store = _stream(model, options, device, plan.store)
    _recompute(model, options, device)
    return replace(plan, store=store, checkpointing=bool(options.checkpointing))


def _stream(
    model: LTXTransformer,
    options: MemoryOptions,
    device: torch.device,
    store: BlockStore | None,
    hosts: HostBlocks | None = None,
) -> BlockStore | None:
    blocks = model.transformer_blocks
    if not options.blocks_to_swap:
        return store
    if store is None:
        indices = streamed_indices(len(blocks), options.blocks_to_swap)
        store = BlockStore(blocks, indices, device, ring=options.ring, pinned=options.pinned, hosts=hosts)
        model.block_runner = store
    else:
        indices = further_indices(len(blocks), store.streamed, options.blocks_to_swap)
        store.restream(blocks, indices, options.ring)
    return store


def _recompute(model: LTXTransformer, options: MemoryOptions, device: torch.device) -> None:
    """Recompute all blocks, or the first ones: their turn comes when the others' activations are gone."""
    if not options.checkpointing:
        return
    count = options.recomputed_blocks
    saved = {"saved_inputs": ActivationOffload(device)} if options.checkpoint_offload else {}
    model.enable_gradient_checkpointing(blocks=None if count is None else range(count), **saved)
    for index, block in enumerate(model.transformer_blocks):
        for layer in block.modules():
            if isinstance(layer, QuantisedLinear):  # see `quantization.expand`
                layer.shown = count is None or index < count


def _compile(model: LTXTransformer, options: CompileOptions) -> None:
    """Compile each block by itself, so that the first step does not wait for the whole model."""
    compile_blocks(
        model.transformer_blocks,
        backend=options.backend,
        mode=None if options.mode == "default" else options.mode,
        dynamic=options.dynamic,
        fullgraph=options.fullgraph,
        cache_entries=options.cache_size_limit or CACHE_ENTRIES,
    )
