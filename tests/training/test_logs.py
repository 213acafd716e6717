"""What trackers are shown besides numbers."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from ltx2_tuner.errors import UserError
from ltx2_tuner.media.write import write_image, write_video, write_wav
from ltx2_tuner.training.logs import Trackers
from ltx2_tuner.training.options import LogOptions


@pytest.fixture
def files(tmp_path):
    frames = np.full((9, 32, 64, 3), 90, np.uint8)
    paths = [tmp_path / name for name in ("a.mp4", "a.wav", "a_av.mp4", "b.png")]
    sound = np.zeros((2, 4800), np.float32)
    write_video(paths[0], frames, 25)
    write_wav(paths[1], sound, 16000)
    write_video(paths[2], frames, 25, (sound, 16000))
    write_image(paths[3], frames[0])
    return paths


def test_tensorboard_gets_pictures_and_sound_of_samples(tmp_path, files):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(LogOptions(tmp_path / "logs", ("tensorboard",)), is_main=True)
    trackers.sample(0, files[:3], 5)
    trackers.sample(1, files[3:], 5)
    trackers.close()
    events = EventAccumulator(str(next((tmp_path / "logs").glob("*/network_train")))).Reload()
    assert set(events.Tags()["images"]) == {"sample_0", "sample_1"} and events.Tags()["audio"] == ["sample_0"]
    (image,) = events.Images("sample_0")
    assert (image.step, image.width, image.height) == (5, 64, 32)


def test_wandb_gets_numbers_histograms_and_files(tmp_path, files, monkeypatch):
    """Against a stand-in for the package, which CI does not have."""
    logged, settings = [], {}
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **keywords: settings.update(keywords) or run
    wandb.login = lambda key: settings.update(key=key)
    wandb.Histogram = lambda values: ("histogram", values)
    for kind in ("Video", "Image", "Audio"):
        setattr(wandb, kind, lambda path, kind=kind: (kind, path))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tmp_path / "tracker.toml"
    config.write_text("[wandb]\nentity = 'team'\n", encoding="utf-8")
    options = LogOptions(trackers=("wandb",), name="project", tracker_config=config, wandb_run_name="mine")
    trackers = Trackers(options, is_main=True, config={"seed": 1}, wandb_key="secret")
    trackers.log({"loss/current": 1.5}, 3)
    trackers.histogram("timestep/used_values", [1.0], 3)
    trackers.sample(0, files[:2], 3)
    trackers.close()
    assert settings["project"] == "project" and settings["name"] == "mine" and settings["entity"] == "team"
    assert settings["config"] == {"seed": 1} and settings["key"] == "secret"
    assert logged == [
        (3, {"loss/current": 1.5}),
        (3, {"timestep/used_values": ("histogram", [1.0])}),
        (3, {"sample_0": ("Video", str(files[0]))}),
        (3, {"sample_0_audio": ("Audio", str(files[1]))}),
    ]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Trackers(LogOptions(trackers=("wandb",)), is_main=True)


def test_only_the_first_process_logs(tmp_path):
    trackers = Trackers(LogOptions(tmp_path / "logs", ("tensorboard",)), is_main=False)
    trackers.log({"loss/current": 1.0}, 1)
    assert not (tmp_path / "logs").exists()
