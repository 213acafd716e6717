"""The training loop on a CUDA device."""

from __future__ import annotations

import warnings

import pytest
import torch

from ltx2_tuner.training.sources import Processes
from tests.training.tiny import Clip, Recorder, make_trainer, write_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 12
WATCHED = range(6, STEPS)  # nothing is compiled, recorded, or saved between these steps


class Watch(Recorder):
    """Has torch warn of everything that waits for the device while the watched steps run."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        super().log(metrics, step)
        torch.cuda.set_sync_debug_mode("warn" if step in WATCHED[:-1] else "default")


@pytest.mark.parametrize("compiled", [True, False], ids=["recorded", "eager"])
def test_steps_wait_for_nothing(tmp_path, checkpoint, compiled):
    """But for the numbers of a step, which are read when the next batch has been given to the device."""
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)] * STEPS)
    flags = ("--ltx2_mode", "av", "--mixed_precision", "bf16", "--max_train_steps", STEPS)
    recorder = Watch()
    trainer = make_trainer(
        space.arguments(*flags, "--compile" if compiled else "--no-compile"),
        recorder,
        processes=Processes(torch.device("cuda", 0)),
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = {
        f"{warning.filename}:{warning.lineno}" for warning in caught if "called a synchronizing" in str(warning.message)
    }
    assert not waits
    assert len(recorder.values("loss/current")) == STEPS
