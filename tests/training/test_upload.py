"""What is asked of the hub's client."""

from __future__ import annotations

import threading

import pytest

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.upload import Uploader, UploadOptions, download_state
from tests.training.tiny import make_trainer, write_workspace


class Client:
    """Stands for HfApi: keeps what is asked."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.fail = fail
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        def call(*args, **more):
            self.gate.wait(20)
            if args:
                more["repo_id"] = args[0]
            self.calls.append((name, more))
            if self.fail is not None:
                raise self.fail

        return call


def test_a_run_uploads_what_it_saves(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    trainer = make_trainer(space.arguments("--save_state", "--save_every_n_steps", 2, "--no_save_original_lora"))
    client = Client()
    options = UploadOptions("me/loras", folder="/runs/", public=True, states=True)
    trainer.run.saver.uploader = Uploader(options, client)
    trainer.train()
    names = [(name, more.get("path_in_repo")) for name, more in client.calls]
    assert names == [
        ("create_repo", None),
        ("upload_file", "runs/tiny-step00000002.comfy.safetensors"),
        ("upload_folder", "runs/tiny-step00000002-state"),
        # the last step's own checkpoint, then the end
        ("upload_file", "runs/tiny-step00000004.comfy.safetensors"),
        ("upload_folder", "runs/tiny-step00000004-state"),
        ("upload_file", "runs/tiny.comfy.safetensors"),
        ("upload_folder", "runs/tiny-state"),
    ]
    assert client.calls[0][1] == {"repo_id": "me/loras", "repo_type": "model", "private": False, "exist_ok": True}


def test_beside_training_only_the_last_is_waited_for(tmp_path):
    client = Client()
    client.gate.clear()
    uploader = Uploader(UploadOptions("me/loras", beside=True), client)
    uploader.send(tmp_path / "a.safetensors")
    assert not client.calls
    client.gate.set()
    uploader.send(tmp_path / "b.safetensors", last=True)
    assert [more.get("path_in_repo") for _, more in client.calls] == [None, "a.safetensors", "b.safetensors"]


def test_failures_are_told_without_the_token(tmp_path, caplog):
    client = Client(ConnectionError("no route for hf_secret"))
    uploader = Uploader(UploadOptions("me/loras", token="hf_secret"), client)
    uploader.send(tmp_path / "a.safetensors")
    assert "a.safetensors was not uploaded to me/loras: ConnectionError: no route for ***" in caplog.text
    uploader.send(tmp_path / "a.safetensors")
    assert [name for name, _ in client.calls] == ["create_repo", "create_repo"], "it is tried again"


def test_a_state_is_found_by_its_place(tmp_path):
    client = Client()
    (tmp_path / "runs" / "x-state").mkdir(parents=True)
    folder = download_state("me/loras/runs/x-state:v1:dataset", tmp_path, client=client)
    assert folder == tmp_path / "runs" / "x-state"
    asked = {"repo_id": "me/loras", "repo_type": "dataset", "revision": "v1", "local_dir": str(tmp_path)}
    assert client.calls == [("snapshot_download", {**asked, "allow_patterns": ["runs/x-state/*"]})]


@pytest.mark.parametrize("place", ["me/loras", "me/loras/../x", "me/loras/x:main:zoo"])
def test_what_is_no_place(tmp_path, place):
    with pytest.raises(UserError, match="give user/repository/path"):
        download_state(place, tmp_path, client=Client())


def test_what_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="has no folder x"):
        download_state("me/loras/x", tmp_path, client=Client())
    with pytest.raises(UserError, match=r"OSError: gone \*\*\*\); check the name"):
        download_state("me/loras/x", tmp_path, "hf_s", client=Client(OSError("gone hf_s")))
