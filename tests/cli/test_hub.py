"""Uploading to the hub and resuming from it, with huggingface_hub's own client and a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.hub import running_hub
from tests.training.tiny import write_checkpoint, write_workspace

pytest.importorskip("huggingface_hub")
SCRIPT = Path(__file__).resolve().parents[2] / "ltx2_train_network.py"
TOKEN = "hf_not_a_real_one"


def run(space, url: str, *flags: object) -> subprocess.CompletedProcess:
    home = space.root / "hub-home"
    names = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **names, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, str(SCRIPT), *space.arguments(*flags)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)


def test_checkpoints_and_states_go_up_and_a_run_comes_back(tmp_path):
    space = write_workspace(tmp_path, write_checkpoint(tmp_path / "tiny.safetensors"))
    with running_hub() as hub:
        flags = ("--save_state", "--save_every_n_steps", 2, "--save_state_to_huggingface", "--async_upload")
        flags += ("--huggingface_repo_id", "me/loras", "--huggingface_path_in_repo", "runs/fox")
        done = run(space, hub.url, *flags, "--huggingface_token", TOKEN)
        assert done.returncode == 0, done.stderr
        assert "was not uploaded" not in done.stderr
        (creation,) = [body[0] for method, path, body in hub.requests if path == "/api/repos/create"]
        assert creation["name"] == "loras" and creation.get("private", True) is True
        for stem in ("tiny-step00000002", "tiny"):
            for suffix in (".safetensors", ".comfy.safetensors"):
                assert hub.files[f"runs/fox/{stem}{suffix}"] == (space.output / f"{stem}{suffix}").read_bytes()
            state = {f"runs/fox/{stem}-state/{path.name}" for path in (space.output / f"{stem}-state").iterdir()}
            assert state <= hub.files.keys()
        assert hub.tokens == {f"Bearer {TOKEN}"}
        written = [path for path in space.output.rglob("*") if path.is_file()]
        assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
        assert TOKEN not in done.stderr + done.stdout

        place = "me/loras/runs/fox/tiny-step00000002-state:main"
        flags = ("--resume", place, "--resume_from_huggingface", "--output_dir", tmp_path / "rest", "--save_state")
        done = run(space, hub.url, *flags)
        assert done.returncode == 0, done.stderr
        assert "at step 2" in done.stderr
    name = "tiny-state/network.safetensors"
    assert (tmp_path / "rest" / name).read_bytes() == (space.output / name).read_bytes()


@pytest.mark.slow
def test_a_hub_that_is_down_does_not_end_a_run(tmp_path):
    space = write_workspace(tmp_path, write_checkpoint(tmp_path / "tiny.safetensors"))
    done = run(space, "http://127.0.0.1:9", "--huggingface_repo_id", "me/loras", "--max_train_steps", 1)
    assert done.returncode == 0, done.stderr
    assert "tiny.safetensors was not uploaded to me/loras" in done.stderr
    assert (space.output / "tiny.safetensors").is_file()
