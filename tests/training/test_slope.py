"""Long runs neither grow nor leave files open (R15)."""

from __future__ import annotations

import os

import psutil
import pytest

from tests.training.tiny import Clip, Recorder, make_trainer, write_workspace


class Watch(Recorder):
    """Looks at the process at every step instead of keeping what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.process = psutil.Process(os.getpid())
        self.memory: list[int] = []  # bytes
        self.files: list[int] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.memory.append(self.process.memory_info().rss)
        self.files.append(self.process.num_fds() if hasattr(self.process, "num_fds") else 0)


@pytest.mark.parametrize(
    ("steps", "limit_mb"), [(150, 8), pytest.param(2000, 26, marks=pytest.mark.slow)], ids=["short", "full"]
)
@pytest.mark.parametrize("memory", [[], ["--blocks_to_swap", 1, "--gradient_checkpointing"]], ids=["kept", "streamed"])
def test_memory_and_open_files_stay(tmp_path, checkpoint, steps, limit_mb, memory):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17), Clip(grid=(2, 2, 3), sound=9)])
    watch = Watch()
    flags = ["--ltx2_mode", "av", "--max_train_steps", steps, "--log_timestep_distribution_interval", 50]
    make_trainer(space.arguments(*flags, *memory), watch).train()
    assert len(watch.memory) >= steps
    third = len(watch.memory) // 3  # what is allocated once is allocated by then
    grown = min(watch.memory[-third // 2 :]) - min(watch.memory[third : third + third // 2])
    assert grown < limit_mb * 1e6, f"{grown / 1e6:.1f} MB in two thirds of {steps} steps"
    assert max(watch.files[third:]) <= max(watch.files[:third])
