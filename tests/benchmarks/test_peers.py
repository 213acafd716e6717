"""The benchmark of the official model runs without a GPU, and its model is the one that ours is compared with."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import peers, train_step

pytestmark = pytest.mark.oracle
SMALL = ["--layers", "2", "--width_divisor", "8", "--size", "64", "64", "--frames", "9", "--device", "cpu"]


@pytest.mark.parametrize("more", [[], ["--recompute", "full"]], ids=["none", "full"])
def test_prints_one_line_that_says_what_was_measured(more: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    monkeypatch.setattr(train_step, "MEASURED", 1)
    line = peers.main([*SMALL, *more])
    assert json.loads(capsys.readouterr().out) == line
    assert line["sec"] > 0 and line["recompute"] == (more or ["none"])[-1] and line["lora_dtype"] == "float32"
    assert line["tokens"] == train_step.main(SMALL)["tokens"]


def test_the_same_matrices_are_trained_as_in_our_step() -> None:
    args = peers.parse_arguments(SMALL)
    args.mode = "av"
    theirs = peers.PeerStep(args, torch.device("cpu"))
    ours = train_step.Step(train_step.parse_arguments(SMALL), torch.device("cpu"))
    shapes = [sorted(tuple(parameter.shape) for parameter in step.parameters) for step in (theirs, ours)]
    assert shapes[0] == shapes[1]
    theirs.loss().backward()
    assert all(parameter.grad.isfinite().all() for parameter in theirs.parameters)


def test_each_block_is_compiled_and_recomputed_where_asked() -> None:
    def step(*more: str) -> peers.PeerStep:
        args = peers.parse_arguments([*SMALL, *more])
        args.mode = "av"
        return peers.PeerStep(args, torch.device("cpu"))

    def kept(made: peers.PeerStep) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda none: none):
            made.loss()
        return sum(sizes)

    plain, compiled, recomputed = step(), step("--compile"), step("--recompute", "full")
    for made, expected in ((plain, False), (compiled, True)):
        blocks = made.model.base_model.model.transformer_blocks
        assert [block._compiled_call_impl is not None for block in blocks] == [expected] * 2
    assert kept(recomputed) < 0.5 * kept(plain)
