"""The benchmark of regularizers runs without a GPU, with the memory and the compilation that the flags say."""

from __future__ import annotations

import json

import pytest

from benchmarks import regularizers

SMALL = ["--layers", "2", "--width_divisor", "8", "--size", "64", "64", "--frames", "9", "--device", "cpu"]


def test_prints_a_line_for_each_choice(capsys: pytest.CaptureFixture) -> None:
    regularizers.main([*SMALL, "--blocks_to_swap", "1", "--recompute", "full"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["regularizers"] for line in lines] == [name for name, *_ in regularizers.choices(2)]
    assert all(line["sec"] > 0 and line["blocks_to_swap"] == 1 for line in lines)


def test_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, prepare = [], regularizers.prepare_model

    def noting(model, options, compilation, *more, **keywords):
        asked.append((options.ring, options.checkpointing, compilation.enabled, compilation.dynamic))
        return prepare(model, options, compilation, *more, **keywords)

    monkeypatch.setattr(regularizers, "prepare_model", noting)
    flags = [*SMALL, "--blocks_to_swap", "1", "--ring", "1", "--recompute", "full", "--compile", "--dynamic", "true"]
    args = regularizers.train_step.parse_arguments(flags)
    regularizers.Bench(args, regularizers.torch.device("cpu"))
    assert asked == [(1, True, True, True)]


@pytest.mark.parametrize("flags", [[], ["--no-graphs", "--streams", "1"], ["--no-joint"]])
def test_passes_are_made_fast_as_the_flags_say(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    asked = []
    monkeypatch.setattr(regularizers.train_step, "accelerate", lambda *_, **keywords: asked.append(keywords))
    args = regularizers.train_step.parse_arguments([*SMALL, *flags])
    regularizers.Bench(args, regularizers.torch.device("cpu"))
    assert asked == ([{"graphs": args.graphs, "streams": args.streams}] if args.joint else [])


def test_a_profile_is_refused() -> None:
    with pytest.raises(SystemExit, match="--profile"):
        regularizers.main([*SMALL, "--profile", "top.txt"])
