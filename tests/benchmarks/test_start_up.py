"""The start-up benchmark on the tiny checkpoint."""

from __future__ import annotations

import json

from benchmarks import start_up
from tests.training.tiny import write_checkpoint, write_workspace


def test_it_times_the_first_step(tmp_path, capsys):
    space = write_workspace(tmp_path, write_checkpoint(tmp_path / "tiny.safetensors"))
    assert start_up.main(["--runs", "1", "--", *space.arguments()]) == 0
    line = json.loads(capsys.readouterr().out)
    assert 0 < line["reading_sec"] <= line["read_sec"] < line["first_step_sec"] <= line["total_sec"]
    assert line["host_peak_gib"] > 0.05
