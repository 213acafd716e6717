"""Compiled passes whose heads Triton's interpreter forms, beside plain ones; prints how far they differ as JSON.

`TRITON_INTERPRET=1 python -m tests.lora.formed_heads dense fp8:recomputed dense:odd:halved ...`: the format of the
weights, then switches, see `model_of` and `passes`. Without cases it looks at the operators alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ltx2_tuner.lora import LoRANetwork, heads
from ltx2_tuner.lora.joint import join_adapters
from ltx2_tuner.memory.compilation import compile_blocks
from ltx2_tuner.memory.streaming import BlockStore
from ltx2_tuner.models.transformer import LTXTransformer
from tests.memory import blocks
from tests.models.transformer import tiny

ODD = {  # heads and their widths are no powers of two
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "audio_attention_head_dim": 10,
    "cross_attention_dim": 36,
    "audio_cross_attention_dim": 30,
}
launches: list[bool] = []  # for each of a kernel, whether it rotated


def model_of(weights: str, switches: list[str]) -> tuple[LTXTransformer, LoRANetwork]:
    changes = {"num_layers": 2} | (ODD if "odd" in switches else {})
    if "interleaved" in switches:
        changes["rope_type"] = "interleaved"
    version = "2.0" if "ungated" in switches else "2.3"
    how = {"rank": 6 if "rank6" in switches else 4, "alpha": 2.0 if "halved" in switches else None}
    dtype = torch.float16 if "float16" in switches else torch.float32
    return blocks.adapted(weights, dtype=dtype, version=version, **how, **changes)


def passes(case: str, *, compiled: bool) -> tuple[list[Tensor], int]:
    """The velocities and gradients of a pass, and the bytes that are kept for its backward pass."""
    weights, *switches = case.split(":")
    model, network = model_of(weights, switches)
    streamed = (0,) if "streamed" in switches else ()
    if streamed:
        model.block_runner = BlockStore(model.transformer_blocks, streamed, torch.device("cpu"))
    dtype = model.transformer_blocks[0].attn1.q_norm.weight.dtype
    join_adapters(model, network, dtype, streamed=bool(streamed) or "unfixed" in switches)
    recomputed = "recomputed" in switches or "cheap" in switches
    model.enable_gradient_checkpointing(recomputed, keep_products="cheap" in switches)
    if compiled:
        torch._dynamo.reset()
        how = {"backend": "aot_eager_decomp_partition", "dynamic": "dynamic" in switches}
        compile_blocks(model.transformer_blocks, fullgraph=True, **how)
    streams = tiny.inputs(model.config)
    if "shared" in switches:  # positions, and so the tables of angles, of one sample for all
        streams = {
            name: dataclasses.replace(stream, positions=stream.positions[:1]) for name, stream in streams.items()
        }
    autocast = torch.autocast("cpu", dtype) if "autocast" in switches else contextlib.nullcontext()
    kept = blocks.Kept(model)
    with autocast, kept.counting():
        velocities = model(**streams)
        if "between" in switches:
            with torch.no_grad():
                model(**streams)
    sum(velocity.float().square().mean() for velocity in velocities).backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [*(velocity.detach() for velocity in velocities), *grads], kept.bytes


def compare(case: str) -> dict[str, object]:
    """The largest relative difference of a velocity or gradient to a plain pass, and how often the kernels ran.

    With the switch "kept" also the bytes that are kept without the kernels, and with them.
    """
    expected, _ = passes(case, compiled=False)
    suits, heads.suits = heads.suits, lambda *_: False
    _, before = passes(case, compiled=True) if case.endswith(":kept") else ([], None)
    heads.suits = suits
    launches.clear()
    found, kept = passes(case, compiled=True)
    assert len(found) == len(expected) > 4
    errors = [float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in zip(found, expected)]
    return {"error": max(errors), "launches": len(launches), "rotating": sum(launches), "kept": [before, kept]}


def check_fakes() -> None:
    """Raise if a compiler would expect other shapes, dtypes or strides than the operators give."""
    batch, tokens, width, rank, count = 2, 3, 16, 6, 2
    for parts, gated, apart, rotates in itertools.product((1, 2, 3), *[(False, True)] * 3):
        gates = count if gated else 0
        rest = gates + 1 + parts * rank  # an unused column among them
        product = torch.randn(batch, tokens, parts * width + (0 if apart else rest))
        lower = torch.randn(batch, tokens, rest) if apart else None
        up, norms = torch.randn(parts, width, rank), [torch.randn(width) for _ in range(2 if parts == 3 else 1)]
        tables = torch.randn(2, 1, tokens, count, width // count // 2).unbind() if rotates else (None, None)
        given = product, lower, None, None, up, norms, *tables, count, gates, 0.5, 1e-6
        *found, logits, before, scales, hidden = check_fake(heads.form_heads, given)
        kept = before, scales, hidden, up, norms, *tables
        widths = product.shape[-1], rest if apart else 0
        check_fake(heads.unform_heads, (found[:parts], logits if gates else None, *kept, *widths, count, gates, 0.5))


def check_fake(operator: Callable[..., tuple[Tensor, ...]], given: tuple) -> tuple[Tensor, ...]:
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    results = operator(*given)
    with FakeTensorMode() as mode:
        fakes = operator(*pytree.tree_map_only(Tensor, mode.from_tensor, given))
    for real, fake in zip(results, fakes, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
    return results


def interpret() -> None:
    """Have the kernels run on the CPU, and count them."""
    heads.available = lambda: True
    heads.suits = lambda x, *shape: heads._fits(*shape)
    made = heads._Given.__init__

    def counted(self, *arguments) -> None:
        made(self, *arguments)
        launches.append(self.constants["ROPE"])

    heads._Given.__init__ = counted


def main(cases: list[str]) -> None:
    interpret()
    if not cases:
        check_fakes()
    agrees = heads._agrees(torch.device("cpu"), torch.float32, 1e-5)
    print(json.dumps({"agrees": agrees, "cases": {case: compare(case) for case in cases}}))


if __name__ == "__main__":
    main(sys.argv[1:])
