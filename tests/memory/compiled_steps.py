"""Passes of a small compiled model; as a program it runs some in a process of their own.

`python -m tests.memory.compiled_steps dense:full:joint nf4:none ...`: format of the weights, what is recomputed,
switches. Prints one JSON line: seconds, a digest of each pass, torch's counters of its caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ltx2_tuner.lora.joint import join_adapters
from ltx2_tuner.memory.compilation import compile_blocks
from ltx2_tuner.memory.streaming import BlockStore
from ltx2_tuner.quantization.feed_forward import fuse_feed_forwards
from tests.memory.blocks import adapted
from tests.models.transformer import tiny

STREAMED = (0, 1)


def results(case: str, backend: object, streams: tuple[str, ...] = ("video", "audio")) -> list[Tensor]:
    """The velocities of a pass and the gradients of its adapters. backend: None for a pass that is not compiled."""
    weights, recompute, *switches = case.split(":")
    model, network = adapted(weights)
    streamed = STREAMED if "streamed" in switches else ()
    if streamed:
        model.block_runner = BlockStore(model.transformer_blocks, streamed, torch.device("cpu"))
    dtype = torch.bfloat16 if "autocast" in switches else torch.float32
    network.set_compute_dtype(dtype)
    if "joint" in switches:
        fuse_feed_forwards(model.feed_forwards)
        join_adapters(model, network, dtype, streamed=bool(streamed))
    model.enable_gradient_checkpointing(recompute != "none", keep_products=recompute == "cheap")
    if backend is not None:
        torch._dynamo.reset()
        compile_blocks(model.transformer_blocks, backend=backend, fullgraph=True)
    inputs = {"video": None, "audio": None} | {name: tiny.inputs(model.config)[name] for name in streams}
    with torch.autocast("cpu", dtype) if "autocast" in switches else contextlib.nullcontext():
        velocities = [velocity for velocity in model(**inputs) if velocity is not None]
    sum(velocity.float().square().mean() for velocity in velocities).backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [*(velocity.detach() for velocity in velocities), *grads]


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.float().numpy().tobytes() for tensor in tensors)).hexdigest()


def main(cases: list[str]) -> None:
    start = time.perf_counter()
    digests = [digest(results(case, "inductor", ("audio",))) for case in cases]
    found = {name: dict(counters[name]) for name in ("aot_autograd", "inductor")}
    print(json.dumps({"seconds": time.perf_counter() - start, "digests": digests, "counters": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
