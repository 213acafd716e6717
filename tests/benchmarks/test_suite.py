"""The suite of benchmarks, small and on the CPU."""

from __future__ import annotations

import json

import psutil
import pytest

from benchmarks import suite

SMALL = ["--layers", "3", "--width_divisor", "16", "--size", "64", "64", "--frames", "9", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


def test_each_row_leaves_its_lines(tmp_path, capfd) -> None:
    rows = ["gradients", "bf16_recomputed"]
    assert suite.main([str(tmp_path), "--rows", *rows, "--minutes", "5", *SMALL]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [("cosine" in line, line["recompute"], line["layers"]) for line in lines] == [
        (True, "none", 3),
        (False, "full", 3),
    ]
    assert all((tmp_path / f"{name}.jsonl").read_text().count("\n") == 1 for name in rows)


def test_a_row_that_fails_is_named_and_the_next_one_runs(tmp_path, capfd) -> None:
    assert suite.main([str(tmp_path), "--rows", "gradients", "--minutes", "5", *SMALL, "--frames", "x"]) == 1
    assert "gradients" in capfd.readouterr().err and "invalid int value" in (tmp_path / "gradients.log").read_text()


def test_the_time_ends_a_row_and_what_it_started(tmp_path) -> None:
    assert suite.main([str(tmp_path), "--rows", "frontier_fp8", "--minutes", "0.02", *SMALL]) == 1
    left = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in left if "frontier.py" in " ".join(line) and "fp8" in line]


def test_every_row_is_a_command_of_a_benchmark() -> None:
    for name in suite.ROWS:
        script = suite.command(name, SMALL)[1]
        assert (suite.HERE / script).is_file()
