"""The benchmark of buckets runs without a GPU."""

from __future__ import annotations

import json

import pytest

from benchmarks import buckets, train_step


def test_a_line_for_each_bucket(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "MEASURED", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "as before")  # the benchmark sets its own, in its own process
    small = ["--layers", "2", "--width_divisor", "8", "--device", "cpu"]
    assert buckets.main(["--buckets", "9x64x64", "17x64x96", "--", *small]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tokens"]["video"] for line in lines] == [2 * 2 * 2, 3 * 2 * 3]
    assert [line["size"] for line in lines] == [[64, 64], [64, 96]]
    assert all(0 < line["first_sec"] < line["ready_sec"] and line["sec"] > 0 for line in lines)
    assert all(line["recordings"] == 0 and line["compiled"] is False for line in lines)


def test_buckets_are_frames_by_height_by_width() -> None:
    assert buckets.bucket("49x512x768") == (49, 512, 768)
    with pytest.raises(SystemExit):
        buckets.main(["--buckets", "49x512"])
