"""Whole runs of two processes with a sharded base: what replicated ones give, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.memory.sharding import Peers
from ltx2_tuner.training.draws import ValidationDraws
from ltx2_tuner.training.sources import Processes
from tests.training.ranks import ROOT, free_port, run_ranks, worker_environment
from tests.training.tiny import Clip, Recorder, make_trainer, write_workspace

FORMATS = {"dense": [], "fp8": ["--fp8_base", "--fp8_scaled"], "nf4": ["--nf4_base"]}
# With and without sound: audio_dop runs an extra pass on the silent ones, so on one of the two processes alone.
CLIPS = (Clip(sound=17), Clip(), Clip(), Clip(sound=17), Clip(sound=17), Clip())
FLAGS = ["--ltx2_mode", "av", "--audio_dop", "--max_train_steps", 5, "--network_dropout", 0.1]
FLAGS += ["--validate_every_n_steps", 2, "--sample_every_n_steps", 2, "--save_every_n_steps", 3, "--save_state"]


class OneSided:
    """Stands for the previews: many passes on the first process, none on the second."""

    def __init__(self, rank: int) -> None:
        self.rank, self.trainer, self.passes = rank, None, 0

    def sample(self, transformer, *, step, epoch, label, on_sample):
        run = self.trainer.run
        for _ in range(5 if self.rank == 0 else 0):
            run.mode.prepare(self.trainer._recent, ValidationDraws("x", 0, run.draws.sampler)).run(transformer)
            self.passes += 1


def train(report: Path, arguments: list[str]) -> None:
    """Train as one of two processes and tell what was logged, and which bytes of the blocks are here."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    wait = torch.distributed.barrier
    recorder, previews = Recorder(), OneSided(rank)
    processes = Processes(torch.device("cpu"), rank, 2, wait, Peers(rank, 2))
    previews.trainer = trainer = make_trainer(arguments, recorder, previews, processes)
    trainer.train()
    wait()
    store = trainer.run.model.block_runner
    report.with_name(f"{report.name}{rank}.json").write_text(
        json.dumps(
            {
                "steps": [
                    {name: value for name, value in step.items() if not name.startswith("perf")}
                    for step in recorder.steps
                ],
                "passes": previews.passes,
                "shard_bytes": getattr(store, "shard_bytes", None),
            }
        )
    )
    torch.distributed.destroy_process_group()


def two_ranks(report: Path, space, *flags: object) -> list[dict]:
    arguments = space.arguments(*FLAGS, *flags)
    for done in run_ranks(["-m", "tests.training.test_sharded_runs", report, *arguments], timeout=200):
        assert done.returncode == 0, done.stderr
    return [json.loads(report.with_name(f"{report.name}{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("weights", "recompute"),
    [
        ("dense", True),
        ("nf4", False),
        pytest.param("dense", False, marks=pytest.mark.slow),
        pytest.param("fp8", True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_sharded_run_is_the_replicated_one(tmp_path, checkpoint, weights, recompute):
    space = write_workspace(tmp_path, checkpoint, CLIPS, validation=(Clip(sound=17), Clip(), Clip(sound=12)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    flags = [*FORMATS[weights], "--sample_prompts", prompts, "--gemma_root", tmp_path]
    flags += ["--gradient_checkpointing"] if recompute else []
    expected = two_ranks(tmp_path / "plain", space, *flags)
    plain = load_file(space.output / "tiny.safetensors")
    sharded = two_ranks(tmp_path / "sharded", space, *flags, "--shard_base", "--output_name", "sharded")
    assert [rank["passes"] for rank in sharded] == [10, 0]
    assert [rank["steps"] for rank in sharded] == [rank["steps"] for rank in expected]
    assert sum("val_loss" in step for step in sharded[0]["steps"]) == 2
    assert any("loss/audio_dop" in step for step in sharded[0]["steps"])
    saved = load_file(space.output / "sharded.safetensors")
    assert saved.keys() == plain.keys() and all(torch.equal(saved[name], plain[name]) for name in plain)
    own = [rank["shard_bytes"] for rank in sharded]
    assert expected[0]["shard_bytes"] is None and own[0] > 0 and abs(own[0] - own[1]) < 0.01 * own[0]

    state = space.output / "sharded-step00000003-state"
    again = two_ranks(tmp_path / "again", space, *flags, "--shard_base", "--output_name", "again", "--resume", state)
    resumed = load_file(space.output / "again.safetensors")
    assert all(torch.equal(resumed[name], plain[name]) for name in plain)
    losses = [[step["loss/current"] for step in run[0]["steps"] if "loss/current" in step] for run in (expected, again)]
    assert losses[1] == losses[0][3:]


def test_accelerate_turns_it_on(tmp_path, checkpoint):
    """The launcher's flags as the guide has them."""
    space = write_workspace(tmp_path, checkpoint)
    guide = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    (flags,) = re.findall(r"^accelerate launch (--use_fsdp.*) ltx2_train_network.py ", guide, re.MULTILINE)
    launcher = ["-m", "accelerate.commands.launch", *flags.split(), "--num_machines", 1]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    command = [sys.executable, *launcher, ROOT / "ltx2_train_network.py", *space.arguments("--max_train_steps", 2)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, env=worker_environment())
    assert done.returncode == 0, done.stderr
    assert "2 blocks sharded over 2 processes" in done.stderr
    assert (space.output / "tiny.safetensors").is_file()


def test_the_planner_counts_a_share_of_each_block(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    script = [ROOT / "ltx2_train_network.py", *space.arguments("--max_train_steps", 1, "--vram_budget", 8)]
    first, second = run_ranks([*script, "--shard_base"])
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "memory plan: 2 blocks sharded over 2 processes, 0 recomputed" in first.stderr
    assert "1/2 of 2 of 2 blocks" in first.stderr and "ring for whole blocks" in first.stderr


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2:])
