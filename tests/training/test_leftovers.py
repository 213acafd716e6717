"""What a killed run had half written goes when it is resumed; nothing else does."""

from __future__ import annotations

from ltx2_tuner.training.state import remove_leftovers


def test_only_what_is_half_written_by_this_name_goes(tmp_path):
    gone_folders = [".tiny-step00000002-state.77.tmp", ".tiny-state.8.tmp", ".tiny-000003-state.removed"]
    gone_files = [".tiny-step00000002.safetensors.77.tmp", ".tiny.comfy.safetensors.1.tmp"]
    kept_folders = ["tiny-step00000002-state", ".tiny2-step00000002-state.77.tmp", ".tiny-state.old", ".tiny.tmp"]
    kept_files = ["tiny.safetensors", ".tiny2.safetensors.7.tmp", ".tiny.log.csv.bak", "notes.tmp"]
    for name in gone_folders + kept_folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.safetensors").write_bytes(b"x")
    for name in gone_files + kept_files:
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path, "tiny")
    assert {path.name for path in tmp_path.iterdir()} == {*kept_folders, *kept_files}
