"""What is compiled is found again by the next process that compiles the same."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

from tests.memory.compiled_steps import results

FAST = ("dense:none:joint:streamed:autocast",)
SLOW = (
    "fp8_compute:full:joint",
    "dense:none:joint",
    "dense:cheap:autocast",
    "dense:full:streamed:autocast",
    "fp8:full:joint:streamed",
    "fp8_compute:none:streamed",
    "nf4:none:joint:streamed:autocast",
    "nf4:cheap",
)


def _as_it_is(graph: torch.fx.GraphModule, *_: object, **__: object):
    """In place of Inductor's code generation, which takes a minute on a CPU."""
    run = lambda arguments: graph(*arguments)  # noqa: E731
    run._boxed_call = True
    return run


@pytest.mark.parametrize("case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_part_may_be_kept(case: str, tmp_path, monkeypatch) -> None:
    """torch decides it before it compiles, by what is in the graph; and compiled passes give what eager ones do."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    found = results(case, functools.partial(compile_fx, inner_compile=_as_it_is))
    caches = counters["aot_autograd"]
    assert caches["autograd_cache_miss"] == caches["total"] >= 4, dict(caches)
    assert "autograd_cache_bypass" not in caches
    rough = "autocast" in case or "fp8_compute" in case  # rounded to 8 bits, or to 4, at other places
    for actual, expected in zip(found, results(case, None), strict=True):
        if rough:
            assert torch.cosine_similarity(actual.flatten().float(), expected.flatten().float(), dim=0) > 0.99
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_a_second_process_compiles_nothing(tmp_path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.memory.compiled_steps", *FAST, SLOW[0]]
    lines = []
    for seed in ("1", "2"):  # of the hashes of strings: an order of a set that got into a key would show
        run = subprocess.run(command, env=environment | {"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        lines.append(json.loads(run.stdout))
    first, second = lines
    assert first["counters"]["aot_autograd"]["autograd_cache_saved"] > 0
    caches = second["counters"]["aot_autograd"]
    assert caches["autograd_cache_hit"] == caches["total"], caches
    assert "fxgraph_cache_miss" not in second["counters"]["inductor"]
    assert second["digests"] == first["digests"]
    print(f"{first['seconds']:.1f} s, then {second['seconds']:.1f} s")
