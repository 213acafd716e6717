"""The scaling benchmark runs without a GPU, with and without a sharded base."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling

SMALL = ["--layers", "2", "--width_divisor", "32", "--size", "64", "64", "--frames", "9", "--device", "cpu"]


@pytest.mark.parametrize(
    "arguments",
    [pytest.param([], marks=pytest.mark.slow), ["--shard", "--precision", "nf4", "--recompute", "full"]],
    ids=["replicated", "sharded"],
)
def test_prints_a_line_for_each_number_of_processes(arguments: list[str], capsys) -> None:
    lines = scaling.main(["--gpus", "1", "2", *SMALL, *arguments])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert [line["gpus"] for line in lines] == [1, 2]
    assert [line["sharded"] for line in lines] == [False, bool(arguments)]
    assert lines[0]["efficiency"] == 1 and lines[1]["efficiency"] > 0
    for line in lines:
        assert line["samples_per_sec"] == pytest.approx(line["gpus"] / line["sec"], rel=0.01)
        assert len(line["peak_gib"]) == line["gpus"]
