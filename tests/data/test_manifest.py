from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ltx2_tuner.data.batches import TrainingData, ValidationData
from ltx2_tuner.data.config import load_dataset_config
from ltx2_tuner.data.manifest import load_manifest, write_manifest
from ltx2_tuner.errors import UserError
from tests.data.caches import write_video_item


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TOML = """
[general]
resolution = [768, 512]
[[datasets]]
video_directory = "videos"
cache_directory = "caches/train"
target_frames = [1, 17]
batch_size = 2
audio_loss_weight = 0.5
reference_directory = "refs"
reference_cache_directory = "caches/refs"
[[validation_datasets]]
video_directory = "videos"
cache_directory = "caches/val"
"""


def written() -> Path:
    for name in ("videos", "refs"):
        Path(name).mkdir()
    Path("d.toml").write_text(TOML, encoding="utf-8")
    write_manifest("manifest.json", load_dataset_config("d.toml", "video"), {"text": "0123456789abcdef"})
    return Path("manifest.json")


def test_what_is_written():
    manifest = json.loads(written().read_text(encoding="utf-8"))
    assert manifest["format"] == "musubi_tuner_dataset_manifest"
    assert (manifest["version"], manifest["architecture"]) == (1, "ltx2")
    assert manifest["source_dataset_config"] == "d.toml"
    assert manifest["base_directory"] == str(Path.cwd())
    assert manifest["component_ids"] == {"text": "0123456789abcdef"}
    (entry,) = manifest["datasets"]
    assert entry["dataset_type"] == "video"
    params = entry["params"]
    assert params["resolution"] == [768, 512] and params["target_frames"] == [1, 17]
    assert params["cache_only"] is True and params["architecture"] == "ltx2"
    assert params["cache_directory"] == str(Path("caches/train"))
    for name in ("video_directory", "image_jsonl_file", "reference_directory", "control_directory"):
        assert params[name] is None
    assert len(manifest["validation_datasets"]) == 1


def test_training_from_a_manifest_needs_no_sources():
    path = written()
    original = load_dataset_config("d.toml", "video")
    for folder in ("videos", "refs"):
        shutil.rmtree(folder)
    config = load_manifest(path, "video")
    (dataset,), (first,) = config.datasets, original.datasets
    assert dataset.cache_only and not dataset.has_reference_source
    for name in ("cache_directory", "resolution", "batch_size", "audio_loss_weight", "target_frames", "label"):
        assert getattr(dataset, name) == getattr(first, name)
    assert config.validation[0].validation
    write_video_item(Path("caches/val"), "a")
    assert [batch["captions"] for batch in ValidationData(config)] == [["about a"]]


def test_directories_are_found_from_elsewhere(tmp_path, monkeypatch):
    path = written()
    Path("caches/train").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    dataset = load_manifest(path.resolve() if path.is_absolute() else tmp_path / path, "video").datasets[0]
    assert dataset.cache_directory.resolve() == tmp_path / "caches" / "train"
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "caches", moved / "caches")
    shutil.move(tmp_path / "manifest.json", moved / "manifest.json")
    dataset = load_manifest(moved / "manifest.json", "video").datasets[0]
    assert dataset.cache_directory == moved / "caches" / "train"


def save(**changes) -> Path:
    """A manifest as other tools write it: few parameters, unknown ones, no extra keys."""
    params = {"cache_directory": "cache", "batch_size": None, "resolution": [512, 512], "fp_1f_no_post": False, "x": 1}
    manifest = {
        "format": "musubi_tuner_dataset_manifest",
        "version": 1,
        "datasets": [{"dataset_type": "video", "params": params}],
    }
    path = Path("other.json")
    path.write_text(json.dumps(manifest | changes), encoding="utf-8")
    return path


def test_a_manifest_of_another_tool():
    write_video_item(Path("cache"), "a")
    config = load_manifest(save(), "video", typed={"separate_audio_buckets": True, "batch_size": 9})
    dataset = config.datasets[0]
    assert (dataset.batch_size, dataset.resolution) == (1, (512, 512))
    assert dataset.separate_audio_buckets is True
    assert len(TrainingData(config, seed=0)) == 1


def entry(**params) -> list[dict]:
    return [{"dataset_type": "video", "params": {"cache_directory": "cache", **params}}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "manifest version 2 is not 1"),
        ({"version": None}, "manifest version None"),
        ({"architecture": "wan"}, "made for 'wan'"),
        ({"datasets": {}}, "'datasets' must be a non-empty list"),
        ({"datasets": [3]}, r"datasets[0]: must have a dataset_type"),
        ({"datasets": [{"dataset_type": "text", "params": {}}]}, "must have a dataset_type"),
        ({"datasets": entry(cache_directory=None)}, "params has no cache_directory"),
        ({"datasets": entry(cache_directory="a\0b")}, "without control characters"),
        ({"datasets": entry(batch_size=True)}, "'batch_size' must be an integer of at least 1, not true"),
        ({"datasets": entry() + entry()}, "share cache_directory"),
        ({"datasets": entry(), "validation_datasets": 3}, "'validation_datasets' must be"),
    ],
)
def test_bad_manifests(changes, message):
    with pytest.raises(UserError) as caught:
        load_manifest(save(**changes), "video")
    assert message in str(caught.value) and "other.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 99999])
def test_files_that_are_no_manifest(content):
    Path("m.json").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.json"):
        load_manifest("m.json", "video")


def test_a_missing_manifest():
    with pytest.raises(UserError, match="no such manifest"):
        load_manifest("gone.json", "video")
