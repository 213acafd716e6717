"""SIGKILL at random moments: the rerun ends with the bytes of an uninterrupted run (R6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caching.text_world import World, digests, make_models

# Imports once, then runs the script in forked children, so that a kill costs a second and hits the work.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ltx2_tuner.cli import ltx2_cache_text_encoder_outputs as script
from ltx2_tuner.compat import prepare_torchaudio

prepare_torchaudio()
from transformers import Gemma3TextModel

def start(arguments):
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(script.main(arguments))
    return child

def at_work(child, journal):
    while not journal.exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)

job = json.loads(sys.argv[1])
journals = {name: Path(job[name]) / "ltx2_cache_text.journal" for name in ("whole_cache", "cache")}
draw = random.Random(job["seed"])
child = start(job["whole"])
at_work(child, journals["whole_cache"])
begin = time.monotonic()
assert os.waitpid(child, 0)[1] == 0
length = time.monotonic() - begin
killed_at_work = 0
for _ in range(job["kills"]):
    child = start(job["arguments"])
    at_work(child, journals["cache"])
    time.sleep(draw.uniform(0, 0.7 * length))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed_at_work += journals["cache"].exists()
assert os.waitpid(start(job["arguments"]), 0)[1] == 0
print(killed_at_work)
"""


def kill_and_compare(folder: Path, kills: int, rounds: int, seed: int) -> int:
    """Kill `kills` runs in a row, finish, compare; `rounds` times. Returns how many kills hit a run at work."""
    (folder / "models").mkdir()
    models = make_models(folder / "models")
    captions = [f"caption number {index} of a cat" for index in range(12)]
    prompts = folder / "prompts.txt"
    prompts.write_text("a fox --n blurry\n")
    flags = ["--precache_sample_prompts", "--sample_prompts", prompts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    hits = 0
    for number in range(rounds):
        whole = World(folder / f"whole {number}", models).create(captions)
        world = World(folder / f"killed {number}", models).create(captions)
        job = {
            "cache": str(world.cache),
            "whole_cache": str(whole.cache),
            "whole": whole.arguments(*flags),
            "arguments": world.arguments(*flags),
            "kills": kills,
            "seed": seed + number,
        }
        result = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(job)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        hits += int(result.stdout.split()[-1])
        assert digests(world.cache) == digests(whole.cache)
    return hits


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_three_kills(tmp_path):
    assert kill_and_compare(tmp_path, kills=3, rounds=1, seed=0) >= 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_thirty_kills(tmp_path):
    assert kill_and_compare(tmp_path, kills=3, rounds=10, seed=100) >= 10
