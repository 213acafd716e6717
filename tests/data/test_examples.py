"""The examples in the documentation and in configs/ are read by the real reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltx2_tuner.data.config import load_dataset_config
from ltx2_tuner.data.options import OPTIONS, SOURCE_KEYS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("dataset_*.toml"))
MODES = {"dataset_audio": "audio", "dataset_av": "av", "dataset_audio_reference": "av"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_sound(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = re.findall(r'^\w+_directory = "(\w+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    for folder in folders:
        Path(folder).mkdir(exist_ok=True)
    mode = MODES.get(path.stem, "video")
    assert load_dataset_config(path, mode).mode == mode


def test_every_example_is_here():
    assert len(CONFIGS) == 6


def test_the_guide_begins_with_an_example_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    Path("videos").mkdir()
    Path("dataset.toml").write_text(re.search(r"```toml\n(.*?)```", guide, re.DOTALL)[1], encoding="utf-8")
    assert load_dataset_config("dataset.toml", "av").datasets[0].target_frames == (1, 17, 33)


def test_the_guide_names_every_option():
    guide = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert [name for name in (*OPTIONS, *SOURCE_KEYS) if f"`{name}`" not in guide] == []
