"""Makes the training pass of a prepared model fast; what cannot be made fast runs as it is."""

from __future__ import annotations

import torch
from torch import nn

from ltx2_tuner.lora import LoRANetwork
from ltx2_tuner.lora.joint import join_adapters
from ltx2_tuner.memory.graphs import TrainingGraphs
from ltx2_tuner.memory.prepare import MemoryPlan
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization.feed_forward import fuse_feed_forwards


def accelerate(
    model: LTXTransformer,
    network: nn.Module,
    plan: MemoryPlan,
    dtype: torch.dtype,
    *,
    stays: bool = True,
    graphs: bool = True,
    streams: int = 2,
) -> TrainingGraphs | None:
    """Join the products of the built-in LoRA, fuse feed-forwards, and record training passes as CUDA graphs.

    Call it after `prepare_model`, when the network is attached, on its device and in the dtype it is trained in. Other
    network modules are left as they are: they reach into the layers that joining goes around.

    Args:
        plan: what `prepare_model` settled; passes are recorded where blocks are compiled, and resident or streamed out
            of page-locked memory.
        dtype: what adapters multiply in.
        stays: False where the whole model leaves the device at times: joint weights would stay behind.
        graphs: False leaves the recording out.
        streams: CUDA streams of a recorded pass, 1 or 2.
    """
    if not isinstance(network, LoRANetwork):
        return None
    fuse_feed_forwards(model.feed_forwards)
    copies = join_adapters(model, network, dtype, stays=stays, streamed=plan.store is not None)
    on_cuda = next(network.parameters()).is_cuda
    streamable = plan.store is None or plan.store.recordable
    if not (graphs and on_cuda and plan.compiled and streamable and not network.has_dropout):
        return None
    adapters = [adapter for _, adapter in network.adapters()]
    return TrainingGraphs(
        model,
        list(network.parameters()),
        state=lambda: frozenset((a.enabled, a.multiplier) for a in adapters),
        copies=copies,
        streams=streams,
    )
