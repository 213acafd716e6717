"""The log and the report that a training run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltx2_tuner.cli.ltx2_train_network import main
from ltx2_tuner.cli.run_record import versions, without_secrets
from ltx2_tuner.training.run_log import read_log
from tests.training.tiny import Clip, write_checkpoint, write_workspace


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def test_a_run_leaves_its_numbers_and_a_page(tmp_path, checkpoint):
    clips = [Clip(sound=17)] * 2
    space = write_workspace(tmp_path, checkpoint, clips, validation=clips[:1])
    assert main(space.arguments("--ltx2_mode", "av", "--validate_every_n_steps", 2)) == 0
    rows = read_log(space.output / "tiny.log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {"loss/current", "loss/average", "loss/video", "loss/audio", "lr/unet", "perf/step_seconds"}
    assert all(names <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4]
    page = (space.output / "tiny.report.html").read_text(encoding="utf-8")
    for part in ("python ltx2_train_network.py", "--ltx2_mode av", "<h2>Versions</h2>", "ltx2_mode = &quot;av&quot;"):
        assert part in page
    assert "Loss of picture and sound" in page


def test_no_report(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    assert main(space.arguments("--no_report", "--max_train_steps", 1)) == 0
    assert (space.output / "tiny.log.csv").is_file() and not (space.output / "tiny.report.html").exists()


def test_a_resumed_run_completes_the_log(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    flags = ("--save_state", "--save_every_n_steps", 2)
    assert main(space.arguments(*flags)) == 0
    losses = [row["loss/current"] for row in read_log(space.output / "tiny.log.csv")]
    state = space.output / "tiny-step00000002-state"
    assert main(space.arguments(*flags, "--resume", state)) == 0
    assert [row["loss/current"] for row in read_log(space.output / "tiny.log.csv")] == losses


def test_secrets_are_not_shown():
    words = ["train", "--huggingface_token", "hf_x", "--wandb_api_key=k", "--seed", "3"]
    assert without_secrets(words) == ["train", "--huggingface_token", "***", "--wandb_api_key=***", "--seed", "3"]


def test_versions_name_what_results_depend_on():
    assert {"ltx2-tuner", "Python", "torch", "transformers"} <= versions().keys()


def test_wandb_offline_gets_the_numbers(tmp_path, checkpoint, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    space = write_workspace(tmp_path, checkpoint)
    logs = tmp_path / "logs"
    logs.mkdir()
    assert main(space.arguments("--log_with", "wandb", "--logging_dir", logs, "--wandb_run_name", "tiny run")) == 0
    assert list(logs.glob("wandb/offline-run-*/*.wandb"))
