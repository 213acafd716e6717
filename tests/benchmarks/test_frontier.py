"""The frontier benchmark, small and on the CPU."""

from __future__ import annotations

import json

import pytest
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
