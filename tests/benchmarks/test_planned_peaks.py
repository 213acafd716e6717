"""What the planner predicts for the measured steps in docs/benchmarks.md: peaks and seconds."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from benchmarks import train_step
from ltx2_tuner.memory.planner import Choice, Footprint
from ltx2_tuner.memory.speed import Speed

ROOT = Path(__file__).resolve().parents[2]
RECOMPUTED = {"none": 0, "full": 48}
H200 = Speed(0.65 * 671e12, 0.9 * 55e9)  # as measure_speed found it there


@functools.cache
def footprint_of(*flags: str) -> Footprint:
    return train_step.footprint(train_step.parse_arguments(list(flags)))


def measured() -> list[dict]:
    """The lines of train_step.py at full size that today's code printed: those of the first section."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    _, _, text = text.partition("## One training step")
    text, _, _ = text.partition("\n## ")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"precision"')]
    return [line for line in lines if line.get("layers") == 48]


def test_there_are_lines_of_every_kind() -> None:
    kinds = {(line["precision"], line["recompute"], bool(line.get("blocks_to_swap"))) for line in measured()}
    assert {("bf16", "none", False), ("bf16", "full", False), ("fp8", "full", True), ("nf4", "full", True)} <= kinds


def frontier() -> list[dict]:
    """The lines of frontier.py, one a plan; without those that docs say had memory taken by others."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    _, _, text = text.partition("## Seconds against memory")
    _, _, text = text.partition("```json")
    text, _, _ = text.partition("```")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"budget_gb"')]
    return list({(line["precision"], line["streamed"], line["recomputed"]): line for line in lines}.values())


def test_the_frontier_has_lines_of_every_precision() -> None:
    assert {line["precision"] for line in frontier()} == {"bf16", "fp8", "nf4"} and len(frontier()) >= 14


@pytest.mark.parametrize("line", frontier(), ids=lambda line: f"{line['precision']}-{line['budget_gb']:g}")
def test_plans_of_the_frontier_are_predicted_likewise(line: dict) -> None:
    footprint = footprint_of("--precision", line["precision"])
    offload = line.get("offload", line["budget_gb"] == 8)  # lines of 28 November do not say it
    choice = Choice(line["streamed"], line["recomputed"], offload, line["ring"])
    assert line["graphs"]
    assert footprint.total(choice) / 2**30 == pytest.approx(line["peak_gib"], rel=0.05)
    assert footprint.seconds(choice, H200) == pytest.approx(line["sec"], rel=0.12)


def planned(line: dict) -> tuple[Footprint, Choice]:
    flags = "--precision", line["precision"], "--lora_dtype", line.get("lora_dtype", "float32"), "--mode", line["mode"]
    flags += "--frames", str(line["frames"])
    return footprint_of(*flags), Choice(
        line.get("blocks_to_swap", 0), RECOMPUTED[line["recompute"]], ring=line.get("ring") or 2
    )


each = pytest.mark.parametrize(
    "line", measured(), ids=lambda line: f"{line['precision']}-{line['recompute']}-{line.get('blocks_to_swap', 0)}"
)


@each
def test_predicted_peaks_are_within_five_percent_of_measured_ones(line: dict) -> None:
    footprint, choice = planned(line)
    assert footprint.total(choice) / 2**30 == pytest.approx(line["peak_gib"], rel=0.05)


@each
def test_predicted_seconds_are_near_the_measured_ones(line: dict) -> None:
    footprint, choice = planned(line)
    assert footprint.seconds(choice, H200) == pytest.approx(line["sec"], rel=0.12)
