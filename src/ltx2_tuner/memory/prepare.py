"""Readies a loaded transformer for training: attention, chunking, recomputation, block streaming, compilation."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import torch

from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.models.transformer import LTXTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """What was settled. streamed: blocks in host memory; checkpointing: whether blocks are recomputed."""

    streamed: int
    checkpointing: bool
    compiled: bool

    def __str__(self) -> str:
        parts = [f"{self.streamed} blocks streamed from host memory" if self.streamed else "all blocks on the device"]
        parts.append("activations recomputed" if self.checkpointing else "activations kept")
        parts.append("blocks compiled" if self.compiled else "not compiled")
        return "plan: " + ", ".join(parts)


def prepare_model(
    model: LTXTransformer, options: MemoryOptions, compilation: CompileOptions, device: torch.device
) -> MemoryPlan:
    """Apply the options to a model whose adapters are attached."""
    model.set_attention_backend(options.attention)
    if options.split_attention != "none":
        model.split_attention(options.split_attention, options.split_mode or "batch", options.split_chunk)
    if options.ffn_chunk_size:
        model.chunk_feed_forward(options.ffn_chunk_target, options.ffn_chunk_size)
    checkpointing = bool(options.checkpointing)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return MemoryPlan(0, checkpointing, _compile(model, compilation, device))


def _compile(model: LTXTransformer, options: CompileOptions, device: torch.device) -> bool:
    """Compile each block by itself, so that the first step does not wait for the whole model."""
    wanted = options.enabled
    if wanted is None:
        wanted = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        if device.type == "cuda" and not wanted:
            logger.info("no compiler back end (triton) here: blocks are not compiled")
    if not wanted:
        return False
    if options.cache_size_limit is not None:
        torch._dynamo.config.recompile_limit = options.cache_size_limit
    for block in model.transformer_blocks:
        block.compile(
            backend=options.backend,
            dynamic=options.dynamic,
            fullgraph=options.fullgraph,
            mode=None if options.mode == "default" else options.mode,
        )
    return True
