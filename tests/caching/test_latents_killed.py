"""SIGKILL at random moments of latent caching: the rerun ends with the bytes of an uninterrupted run (R6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.caching.latents_world import World, digests

# Imports once, then runs the script in forked children, so that a kill costs a second and hits the work.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ltx2_tuner.cli import ltx2_cache_latents as script

def start(arguments):
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(script.main(arguments))
    return child

def until_work(child, journal):
    # True once the run encodes: looking into the clips comes first and leaves nothing behind.
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if journal.exists():
            return True
        time.sleep(0.001)
    return False

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    draw = random.Random(job["seed"])
    child = start(job["whole"])
    until_work(child, Path(job["whole_journal"]))
    begin = time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    length = time.monotonic() - begin
    killed_at_work, journal = 0, Path(job["journal"])
    # Later runs can be much faster than the one that was timed: go on, sooner, until a kill hits a run at work.
    for attempt in range(job["kills"] + 20):
        if attempt >= job["kills"] and killed_at_work:
            break
        child = start(job["arguments"])
        if journal.exists() or until_work(child, journal):
            time.sleep(draw.uniform(0, length if attempt < job["kills"] else length / 8))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        killed_at_work += journal.exists()
    assert os.waitpid(start(job["arguments"]), 0)[1] == 0
    print(killed_at_work)
"""


def kill_and_compare(world: World, kills: int, seed: int) -> int:
    """Kill `kills` runs in a row, finish, compare with a whole run. Returns how many kills hit a run at work."""
    whole = world.folder / f"whole {seed}"
    killed = world.folder / f"killed {seed}"
    options = {"target_frames": [1, 9], "frame_extraction": "slide", "frame_stride": 3, "batch_size": 3}
    arguments = {}
    for cache in (whole, killed):
        world.config = world.folder / f"{cache.name}.toml"
        world.configure(cache=cache, **options)
        arguments[cache] = world.arguments("--num_workers", 1, mode="av")
    job = {
        "whole": arguments[whole],
        "arguments": arguments[killed],
        "whole_journal": str(whole / "ltx2_cache_latents.journal"),
        "journal": str(killed / "ltx2_cache_latents.journal"),
        "kills": kills,
        "seed": seed,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = world.folder / "driver.py"
    driver.write_text(DRIVER)
    result = subprocess.run(
        [sys.executable, str(driver), json.dumps(job)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert digests(killed) == digests(whole)
    return int(result.stdout.split()[-1])


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    for number in range(4):
        world.add_clip(f"{number}.mp4", 20, seconds=0.8)
    return world


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_a_killed_run_is_finished_by_the_next(world):
    assert kill_and_compare(world, kills=3, seed=0) > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_thirty_random_kills(world):
    hits = sum(kill_and_compare(world, kills=3, seed=seed) for seed in range(1, 11))
    print(f"30 kills, {hits} of them in a run at work: 10 of 10 reruns equal to the byte")
    assert hits >= 15
