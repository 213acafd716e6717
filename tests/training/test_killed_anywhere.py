"""Killed in a step, a save, a sample or validation: the resumed run is the one that was never stopped (R1, R5)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_tuner.cli.ltx2_train_network import main
from ltx2_tuner.text_encoding import write_tiny_gemma
from ltx2_tuner.training.run_log import read_log
from ltx2_tuner.training.state import load_state, newest_state
from tests.training.killed import PLACES
from tests.training.tiny import Clip, Workspace, read_json, write_workspace

ROOT = Path(__file__).resolve().parents[2]
CLIPS = (Clip(sound=17), Clip(), Clip(sound=12), Clip(), Clip(sound=17))
STEPS = 9
STATE_FILES = ("network.safetensors", "optimizer.safetensors", "random.safetensors")

# Place -> which visit of it is in the middle of the run, after the first state.
VISITS = {
    "step": 12,  # the second batch of a window
    "optimizer": 6,
    "checkpoint": 1500,  # the middle of a file
    "state": 7,  # files of the second state are written, its manifest is not
    "manifest": 2,
    "rotation": 3,
    "sample": 2,
    "validation": 2,
}


def flags_of(space: Workspace) -> list[str]:
    """Pictures and sound, dropouts, averages, accumulation, validation and samples: all that has a state."""
    prompts = space.root / "prompts.txt"
    prompts.write_text("a fox --w 64 --h 64 --f 1 --s 2 --d 1\n", encoding="utf-8")
    return space.arguments(
        *("--ltx2_mode", "av", "--gradient_accumulation_steps", 2, "--max_train_steps", STEPS),
        *("--network_dropout", 0.1, "--network_args", "rank_dropout=0.1", "--caption_dropout_rate", 0.3),
        *(
            "--ltx2_first_frame_conditioning_p",
            0.5,
            "--audio_loss_balance_mode",
            "ema_mag",
            "--num_timestep_buckets",
            4,
        ),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", 3),
        *("--save_state", "--save_every_n_steps", 2, "--save_last_n_steps", 3, "--validate_every_n_steps", 3),
        *("--sample_prompts", prompts, "--sample_every_n_steps", 4, "--gemma_root", space.root.parent / "gemma"),
        *("--vae_dtype", "float32", "--sample_disable_audio", "--no_report"),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint) -> Workspace:
    """A run that was never stopped."""
    root = tmp_path_factory.mktemp("killed")
    write_tiny_gemma(root / "gemma", seed=0)
    (root / "whole").mkdir()
    space = write_workspace(root / "whole", checkpoint, CLIPS, validation=CLIPS[:2])
    assert main(flags_of(space)) == 0
    return space


def killed(place: str, visit: int, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tests.training.killed", place, str(visit), *arguments]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    expected = -signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM
    assert done.returncode == expected, done.stderr[-2000:]


def assert_same(space: Workspace, whole: Workspace) -> None:
    """Losses, adapter, optimizer, generators and counters are equal to the bit.

    The validation of a step whose state is saved is not repeated, so its number may be missing.
    """
    for name in STATE_FILES:
        mine, theirs = ((run.output / "tiny-state" / name).read_bytes() for run in (space, whole))
        assert mine == theirs, name
    mine, theirs = (read_json(run.output / "tiny-state" / "resume_metadata.json") for run in (space, whole))
    assert mine == theirs
    ignored = {"time", "perf/step_seconds", "perf/data_wait_seconds"}
    ignored |= {"val_loss", "val_loss/video", "val_loss/audio", "val_loss/gap"}
    mine, theirs = (
        [{name: value for name, value in row.items() if name not in ignored} for row in read_log(log)]
        for log in (run.output / "tiny.log.csv" for run in (space, whole))
    )
    assert mine == theirs and [row["step"] for row in mine] == list(range(1, STEPS + 1))
    names, expected = ({path.name for path in run.output.iterdir()} for run in (space, whole))
    extra = names - expected  # the state resumed from is never removed
    assert expected <= names and len(extra) <= 1 and all(name.endswith("-state") for name in extra)


def copy_of(whole: Workspace, root: Path) -> Workspace:
    """The same data, another output folder."""
    return Workspace(whole.root, whole.checkpoint, whole.dataset, root / "output")


FREQUENT = ("step", "state", "sample", "validation")


@pytest.mark.parametrize(
    "place", [place if place in FREQUENT else pytest.param(place, marks=pytest.mark.slow) for place in PLACES]
)
def test_a_run_killed_on_the_way_ends_as_if_it_was_not(tmp_path, whole, place):
    space = copy_of(whole, tmp_path)
    killed(place, VISITS[place], flags_of(space))
    state = newest_state(space.output, "tiny")
    assert 0 < load_state(state).metadata["global_step"] < STEPS
    assert main([*flags_of(space), "--autoresume"]) == 0
    assert_same(space, whole)


@pytest.mark.slow
def test_fifty_kills_at_random_places(tmp_path, whole):
    """50 of 50 resume from a complete state, and the end is the same (R5)."""
    choices = random.Random(0)
    for number in range(50):
        place = choices.choice(sorted(PLACES))
        space = copy_of(whole, tmp_path / str(number))
        killed(place, choices.randint(1, VISITS[place]), flags_of(space))
        assert main([*flags_of(space), "--autoresume"]) == 0
        assert_same(space, whole)
