"""Heads formed by kernels are those that single operations form: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ltx2_tuner.lora import heads
from ltx2_tuner.lora.joint import join_adapters
from ltx2_tuner.memory.compilation import compile_blocks
from tests.memory import blocks

CASES = (  # of `formed_heads`
    "dense:odd:rank6:halved:shared",
    "fp8_compute:halved",
)
SLOW_CASES = (
    "dense:kept",
    "dense:recomputed:kept",
    "dense:cheap:kept",
    "dense:between",
    "dense:dynamic",
    "dense:streamed",
    "dense:ungated",
    "fp8",
    "fp8:streamed:recomputed",
    "fp8_compute:kept",
    "nf4:ungated",
    "fp8_compute:streamed",
    "nf4",
    "nf4:recomputed",
)


def interpreted(*cases: str) -> dict[str, dict]:
    """What `formed_heads` finds in a process of its own: Triton has to know from the start who runs its kernels."""
    pytest.importorskip("triton")
    path = os.pathsep.join(entry or "." for entry in sys.path)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.lora.formed_heads", *cases]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout.splitlines()[-1])


def test_the_operators_are_what_their_definitions_and_fakes_say() -> None:
    assert interpreted()["agrees"]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_compiled_passes_with_the_kernels_are_plain_ones(case: str) -> None:
    found = interpreted(case)["cases"][case]
    assert found["error"] < 1e-5
    assert found["rotating"] > 0
    if case.endswith(":kept"):
        without, kept = found["kept"]
        assert 0 < kept <= without


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense:float16", "dense:float16:autocast"])
def test_half_precision(case: str) -> None:
    found = interpreted(case)["cases"][case]
    assert found["rotating"] > 0 and found["error"] < 2e-2


@pytest.mark.slow
def test_interleaved_rotations_are_left_to_single_operations() -> None:
    """Queries and keys of text are not rotated: their kernels run."""
    found = interpreted("dense:interleaved")["cases"]["dense:interleaved"]
    assert found["rotating"] == 0 < found["launches"]
    assert found["error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear:unfixed", "fp8_compute:ungated"])
def test_other_layers_are_left_to_single_operations(case: str) -> None:
    """Those that do not stay and are no frozen layers; those without a dense matrix for the adapters to lie in."""
    found = interpreted(case)["cases"][case]
    assert found["launches"] == 0 and found["error"] < 1e-5


def test_what_the_kernels_take() -> None:
    split, interleaved = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 16)
    assert heads._fits(32, 2, None) and heads._fits(32, 2, (split, split))
    assert not heads._fits(32, 2, (interleaved, interleaved))
    assert not heads._fits(30, 2, None), "an odd head has no halves"
    assert not heads._fits(2 * heads.LARGEST_WIDTH, 2, None)
    assert not heads.suits(torch.zeros(1, 3, 32), 32, 2, None), "on the CPU"


def refuse(*_: object) -> None:
    raise AssertionError("nothing here can run a kernel")


@pytest.mark.parametrize("available", [False, True])
def test_without_cuda_heads_are_formed_step_by_step(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if available:  # as where a model stays on the CPU of a machine with a GPU
        monkeypatch.setattr(heads, "available", lambda: True)
    elif not torch.cuda.is_available():
        assert not heads.available()
    monkeypatch.setattr(heads, "form_heads", refuse)
    model, network = blocks.adapted("dense")
    join_adapters(model, network, torch.float32)
    expected = blocks.gradients(model, network)
    torch._dynamo.reset()
    compile_blocks(model.transformer_blocks, backend="eager", fullgraph=True)
    for found, wanted in zip(blocks.gradients(model, network), expected, strict=True):
        torch.testing.assert_close(found, wanted)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float32, 1e-5)])
def test_kernels_on_the_gpu(dtype: torch.dtype, tolerance: float) -> None:
    assert heads.available()
    assert heads._agrees(torch.device("cuda"), dtype, tolerance)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("weights", ["dense", "fp8", "nf4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_compiled_passes_on_the_gpu(
    weights: str, recompute: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gradients together: alone, small ones differ by more in bf16, however they are computed."""
    made, launches, results = heads._Given, [], []

    def counted(*arguments: object) -> heads._Given:
        launches.append(len(arguments))
        return made(*arguments)

    monkeypatch.setattr(heads, "_Given", counted)
    for compiled in (False, True):
        model, network = blocks.adapted(weights, "cuda", dtype)
        join_adapters(model, network, dtype)
        model.enable_gradient_checkpointing(recompute)
        if compiled:
            torch._dynamo.reset()
            compile_blocks(model.transformer_blocks, fullgraph=True)
        found = blocks.gradients(model, network, "cuda")
        results.append(torch.cat([tensor.float().flatten() for tensor in found]))
    plain, found = results
    assert launches
    assert (found - plain).norm() <= tolerance * plain.norm()
