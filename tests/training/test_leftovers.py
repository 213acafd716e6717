"""What a killed run had half written goes when it is resumed; nothing else does."""

from __future__ import annotations

import pytest

from ltx2_tuner.training.state import newest_state, remove_leftovers
from tests.training.tiny import train, write_workspace


def test_only_what_is_half_written_by_this_name_goes(tmp_path):
    gone_folders = [".tiny-step00000002-state.old"]
    gone_folders += [".tiny-step00000002-state.77.tmp", ".tiny-state.8.tmp", ".tiny-000003-state.removed"]
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


@pytest.mark.parametrize("again", [False, True])
def test_a_state_that_was_making_way_is_still_found(tmp_path, checkpoint, again):
    """Killed between the two renames that replace a state: the older one lies aside, the newer one is no state yet."""
    space = write_workspace(tmp_path, checkpoint)
    train(space.arguments("--save_state_on_train_end"))
    state, aside = space.output / "tiny-state", space.output / ".tiny-state.old"
    state.rename(aside)
    assert newest_state(space.output, "tiny") == aside
    if again:
        train(space.arguments("--save_state_on_train_end", "--autoresume", "--max_train_steps", 6))
        assert newest_state(space.output, "tiny") == state and not aside.exists()
