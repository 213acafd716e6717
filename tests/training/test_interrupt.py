"""Ctrl-C and SIGTERM as a terminal and others send them: to the run and to everything it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ltx2_tuner.training.progress import stop_requests
from ltx2_tuner.training.state import newest_state, read_manifest
from tests.training.tiny import Clip, Workspace, write_workspace

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups to signal on Windows")


@pytest.fixture
def space(tmp_path, checkpoint) -> Workspace:
    return write_workspace(tmp_path, checkpoint, [Clip()] * 24)


def interrupted(
    arguments: list[str], sign: Path, signals: int = 1, number: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """Exit status and standard error of a run whose process group gets Ctrl-C (or `number`) once `sign` exists."""
    command = [sys.executable, str(ROOT / "ltx2_train_network.py"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True)
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    for _ in range(signals):
        os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("workers", "signals", "number"), [(2, 1, signal.SIGINT), (0, 2, signal.SIGINT), (2, 2, signal.SIGTERM)]
)
def test_the_step_is_finished_and_saved_though_everything_was_signalled(space, workers, signals, number):
    """Loader processes live on; a launcher that passes the signal on a second time is no second request.

    `timeout` and job schedulers send SIGTERM like this.
    """
    flags = ("--save_state", "--save_every_n_steps", 1, "--gradient_accumulation_steps", 12)
    flags += ("--max_train_steps", 100000, "--max_data_loader_n_workers", workers)
    status, errors = interrupted(space.arguments(*flags), space.output / "tiny-step00000001-state", signals, number)
    assert status == 130 and "Traceback" not in errors, errors[-3000:]
    assert "stopping after this step; Ctrl-C again leaves at once" in errors
    state = newest_state(space.output, "tiny")
    assert read_manifest(state)["state_type"] == "interrupt"
    assert f"to go on: the same command with --resume {state}, or with --autoresume" in errors


def test_a_second_request_leaves_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.raised
        os.kill(os.getpid(), signal.SIGINT)  # the same request, passed on by a launcher
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert "leaving at once" in capfd.readouterr().err
