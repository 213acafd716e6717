"""The parts that both caching scripts share."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ltx2_tuner.caching import run
from ltx2_tuner.caching.run import Journal, Tally
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors


def cache_file(path: Path, architecture: str = "ltx2_v1") -> Path:
    write_safetensors(path, {"x": torch.zeros(2)}, {"architecture": architecture})
    return path


def test_journal_goes_on_with_the_same_settings(tmp_path):
    journal = Journal(tmp_path, "text", {"mode": "av"})
    journal.add("naïve name\nin two lines")
    journal.close()
    assert Journal(tmp_path, "text", {"mode": "av"}).done == {"naïve name\nin two lines"}
    assert Journal(tmp_path, "text", {"mode": "video"}).done == set()
    assert Journal(tmp_path, "text", {"mode": "av"}).done == set()


def test_torn_journal_line_costs_one_item(tmp_path):
    journal = Journal(tmp_path, "text", {})
    journal.add("first")
    journal.add("second")
    journal.close()
    journal.path.write_bytes(journal.path.read_bytes()[:-4])
    journal = Journal(tmp_path, "text", {})
    assert journal.done == {"first"}
    journal.add("third")
    journal.close()
    assert Journal(tmp_path, "text", {}).done == {"first", "third"}


def test_finished_journal_is_gone(tmp_path):
    journal = Journal(tmp_path / "new folder", "text", {})
    journal.add("a")
    journal.finish()
    assert not list((tmp_path / "new folder").iterdir())


def test_unusable_cache_directory_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cache.*journal: cannot be written .*check the cache directory"):
        Journal(tmp_path / "cache", "text", {})


def test_disk_check_counts_what_is_added(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: Usage(2000, 1000, 1000))
    existing = tmp_path / "a"
    existing.write_bytes(bytes(600))
    expected = {existing: 700, tmp_path / "not yet" / "b": 800}
    assert run.check_disk_space(expected) == 1500
    with pytest.raises(UserError, match=r"needs about 1.2 kB, but only 1.0 kB .*--ignore_disk_space"):
        run.check_disk_space({**expected, tmp_path / "c": 300})
    run.check_disk_space({**expected, tmp_path / "c": 300}, ignore=True)


def test_orphans_are_our_own_files_without_a_source(tmp_path):
    member = cache_file(tmp_path / "a_ltx2_te.safetensors")
    orphan = cache_file(tmp_path / "b_ltx2_te.safetensors")
    failed = cache_file(tmp_path / "c_ltx2_te.safetensors")
    foreign = cache_file(tmp_path / "d_ltx2_te.safetensors", "wan")
    (tmp_path / "e_ltx2_te.safetensors").write_bytes(b"not a header")
    other = cache_file(tmp_path / "a_0064x0064_ltx2.safetensors")
    found = run.find_orphans(tmp_path, "_ltx2_te.safetensors", [member], lambda name: name.startswith("c_"))
    assert found == [orphan]
    run.remove_orphans(found, keep=True)
    assert orphan.exists()
    run.remove_orphans(found)
    assert not orphan.exists()
    assert all(path.exists() for path in (member, failed, foreign, other))


def test_only_dead_processes_leave_leftovers(tmp_path):
    dead = tmp_path / ".a_ltx2_te.safetensors.999999999.tmp"
    alive = tmp_path / f".a_ltx2_te.safetensors.{run.psutil.Process().pid}.tmp"
    dead.touch()
    alive.touch()
    run.remove_leftovers(tmp_path)
    assert alive.exists() and not dead.exists()


def tally(directory: Path, encoded: int = 0, failed: int = 0) -> Tally:
    result = Tally("Dataset 0", directory, sources=5, items=encoded + failed)
    for _ in range(encoded):
        result.add("encoded")
    for index in range(failed):
        result.fail(f"clip{index}", "because")
    return result


def test_summary_ends_with_the_failed_count(tmp_path):
    counts = tally(tmp_path, encoded=2, failed=1)
    counts.add("no caption", "lonely.mp4")
    counts.add("encoded", track="Audio")
    counts.add("no audio", track="Audio")
    lines = run.summary_lines([counts])
    head = "sources 5 | items 3 | encoded 2 | skipped (existing) 0 | failed 1 | no caption 1"
    assert lines[0] == f"[Dataset 0] {head}"
    assert lines[1] == "Audio: encoded 1, failed 0, no audio 1, skipped (existing) 0"
    assert "[Dataset 0] no caption: lonely.mp4" in lines
    assert f"[Total] {head}" in lines
    assert lines[-2] == "failed: [Dataset 0] clip0: because"
    assert lines[-1].startswith("failed 1 ")


def test_reports_of_both_scripts_live_side_by_side(tmp_path):
    run.write_reports([tally(tmp_path, encoded=1)], "latents")
    run.write_reports([tally(tmp_path, failed=1)], "text")
    report = json.loads((tmp_path / "ltx2_cache_report.json").read_text())
    assert report["latents"]["counts"] == {"encoded": 1}
    assert report["text"]["failures"] == [{"item": "clip0", "reason": "because"}]


@pytest.mark.parametrize(
    ("encoded", "failed", "strict", "status"), [(0, 2, False, 1), (1, 1, False, 0), (1, 1, True, 1), (2, 0, True, 0)]
)
def test_exit_status(tmp_path, encoded, failed, strict, status):
    assert run.exit_status([tally(tmp_path, encoded, failed)], strict=strict) == status


def test_lost_sound_always_counts(tmp_path):
    counts = tally(tmp_path, encoded=2)
    counts.fail("clip", "no sound", track="Audio")
    assert run.exit_status([counts]) == 0
    assert run.exit_status([counts], lost_track="Audio") == 1
