"""A killed run leaves complete states only (R5)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ltx2_tuner.training.state import load_state, newest_state
from tests.training.tiny import make_trainer, write_workspace

SCRIPT = Path(__file__).resolve().parents[2] / "ltx2_train_network.py"


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_while_saving_goes_on_from_a_complete_state(tmp_path, checkpoint, kills):
    space = write_workspace(tmp_path, checkpoint)
    flags = ["--save_state", "--save_every_n_steps", 1, "--save_last_n_steps", 3, "--autoresume"]
    arguments = space.arguments(*flags, "--max_train_steps", 100000)
    moments = random.Random(0)
    step = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        target = space.output / f"tiny-step{step + 1:08d}-state"
        deadline = time.monotonic() + 120
        while not target.is_dir() and newest_step(space.output) <= step:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
        state = load_state(newest_state(space.output, "tiny"))
        assert state.metadata["global_step"] > step
        step = state.metadata["global_step"]
    assert make_trainer(space.arguments(*flags, "--max_train_steps", step + 1)).progress.step == step


def newest_step(output: Path) -> int:
    return max((int(path.name[9:17]) for path in output.glob("tiny-step*-state")), default=0)
