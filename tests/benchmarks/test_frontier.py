"""The frontier benchmark, small and on the CPU."""

from __future__ import annotations

import gc
import json
import logging
import types
import weakref

import pytest
import torch
from PIL import Image

from benchmarks import frontier, train_step

SMALL = ["--layers", "3", "--width_divisor", "8", "--size", "64", "64", "--frames", "9", "--device", "cpu"]


def test_every_budget_gives_a_line_and_all_lines_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    monkeypatch.setattr(train_step, "MEASURED", 1)
    frontier.main(["--here", "--budgets", "4", "5", "--precisions", "fp8", "nf4", "--", *SMALL])
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["precision"], line["budget_gb"]) for line in lines] == [
        (precision, budget) for precision in ("fp8", "nf4") for budget in (5.0, 4.0)
    ]
    assert all(line["sec"] > 0 and line["predicted_gib"] > 0 and line["streamed"] == 0 for line in lines)
    (tmp_path / "lines.jsonl").write_text(text)
    frontier.main(["--draw", str(tmp_path / "lines.jsonl"), str(tmp_path / "frontier.png")])
    picture = tmp_path / "frontier.png"
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.size == (900, 560) and len(image.convert("RGB").getcolors()) > 5


@pytest.mark.parametrize(("budget", "streams"), [(0.5, True), (5, False)])
def test_a_small_budget_streams(budget, streams, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    monkeypatch.setattr(train_step, "MEASURED", 1)
    frontier.main(["--here", "--budgets", str(budget), "--precisions", "bf16", "--", *SMALL])
    line = json.loads(capsys.readouterr().out)
    assert bool(line["streamed"]) == streams


def settled(budget: float) -> frontier.Plan:
    args = train_step.parse_arguments(["--precision", "bf16", *SMALL])
    return frontier.settle(frontier.MemoryOptions(), train_step.footprint(args), budget * frontier.GB, None)


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many steps are made with each plan: its streamed blocks stand for it."""
    monkeypatch.setattr(train_step, "WARM_UP", 4)
    monkeypatch.setattr(train_step, "MEASURED", 2)
    made: list[int] = []
    call = frontier.PlannedStep.__call__

    def counted(step):
        made.append(step.options.blocks_to_swap)
        return call(step)

    monkeypatch.setattr(frontier.PlannedStep, "__call__", counted)
    return made


def measured(budget: float) -> tuple[dict, frontier.Frontier]:
    front = frontier.Frontier(train_step.parse_arguments(["--precision", "bf16", *SMALL]))
    return front.measure(budget), front


def test_a_plan_that_leaves_no_room_to_record_costs_no_measurement(steps, caplog, monkeypatch):
    first, second = settled(5), settled(5).tighter()

    def refusing(step, args):
        refused = {"shape"} if step.options == first.options else set()
        step.graphs = types.SimpleNamespace(
            held=0, refused=refused, recordings={"shape": 1}, release=lambda: None, remove=lambda: None
        )

    monkeypatch.setattr(frontier.PlannedStep, "accelerate", refusing)
    with caplog.at_level(logging.INFO):
        line, _ = measured(5)
    assert line["sec"] > 0 and line["stepped_down"] == 1 and line["graphs"]
    known = frontier.PASSES
    assert known == 3 and len(steps) == known + (4 + 2), "those that it takes to know are part of the warm-up"
    gave_up, kept = (record.getMessage() for record in caplog.records if record.name == frontier.__name__)
    assert gave_up == (
        f"5 GB: gave up {first.choice.streamed} streamed, {first.choice.recomputed} recomputed, ring 0: "
        "it leaves no room for recorded passes"
    )
    assert kept.startswith(f"5 GB: kept {second.choice.streamed} streamed, {second.choice.recomputed} recomputed, ")
    assert kept.endswith(f"predicted {line['predicted_gib']} GiB")


@pytest.mark.parametrize("moment", ["arranging", "backward"])
def test_a_plan_that_does_not_fit_leaves_nothing_behind(moment, steps, caplog, monkeypatch):
    left: list[weakref.ref] = []
    models: list[weakref.ref] = []

    def fail(step):
        """Out of memory with something in a frame, and gradients that nobody has cleared."""
        activations = torch.zeros(1000)
        left.extend((weakref.ref(activations), weakref.ref(step.parameters[0])))
        step.parameters[0].grad = torch.zeros_like(step.parameters[0])
        left.append(weakref.ref(step.parameters[0].grad))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")

    counted, arranged = frontier.PlannedStep.__call__, frontier.PlannedStep.accelerate

    def calling(step):
        if moment == "backward" and not left:
            fail(step)
        assert left[0]() is None and left[2]() is None
        return counted(step)

    def arranging(step, args):
        models.append(weakref.ref(step))
        if moment == "arranging" and not left:
            fail(step)
        arranged(step, args)

    monkeypatch.setattr(frontier.PlannedStep, "__call__", calling)
    monkeypatch.setattr(frontier.PlannedStep, "accelerate", arranging)
    gc.disable()  # what is gone has been cleared on purpose
    try:
        with caplog.at_level(logging.INFO):
            line, front = measured(5)
    finally:
        gc.enable()
    assert line["sec"] > 0 and line["stepped_down"] == 1 and len(steps) == 4 + 2
    assert "recomputed, ring 0: CUDA out of memory. Tried to allocate 1.00 GiB." in caplog.text
    assert "more" not in caplog.text
    rebuilt = moment == "arranging"
    assert (models[0]() is None) == rebuilt and (models[0]() is front.step) != rebuilt, "half arranged is of no use"
