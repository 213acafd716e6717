"""No space left while a checkpoint or a state is written (R9)."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ltx2_tuner import files
from ltx2_tuner.cli.ltx2_train_network import main
from ltx2_tuner.training.state import load_state, newest_state
from tests.training.tiny import make_trainer, write_workspace


@pytest.mark.parametrize(
    "name",
    [
        "tiny-step00000004.safetensors",
        "tiny-step00000004.comfy.safetensors",
        "optimizer.safetensors",
        "resume_metadata.json",
        "state_manifest.json",
    ],
)
def test_the_last_good_state_stays(tmp_path, checkpoint, monkeypatch, capsys, name):
    """The disk is full at step 4; what step 2 left is whole, nothing half-written is there, and the run goes on."""
    space = write_workspace(tmp_path, checkpoint)
    flags = ("--save_state", "--save_every_n_steps", 2, "--max_train_steps", 6)
    earlier = space.output / "tiny-step00000002-state"

    def full(descriptor: int) -> None:
        path = Path(open_files[-1])
        if path.name == name and earlier.is_dir():
            raise OSError(errno.ENOSPC, "No space left on device")

    open_files: list[str] = []
    real = files.atomic_write

    def watched(path):
        open_files.append(str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", watched)
        patch.setattr(files.os, "fsync", full)
        assert main(space.arguments(*flags)) == 1
    error = capsys.readouterr().err
    assert "no space left on the disk; free some and run the command again" in error and name in error
    assert newest_state(space.output, "tiny") == earlier
    assert load_state(earlier).metadata["global_step"] == 2
    assert not [path for path in space.output.rglob("*") if path.name.endswith(".tmp")]
    assert not (space.output / name).exists()
    trainer = make_trainer(space.arguments(*flags, "--autoresume"))
    trainer.train()
    assert trainer.progress.step == 6
