"""Where the scripts have torch keep its compilations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ltx2_tuner.cli import compile_cache
from ltx2_tuner.cli.compile_cache import keep_compilations

SETTING = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(SETTING, "")  # taken back at the end, whatever is set meanwhile
    monkeypatch.delenv(SETTING)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return monkeypatch


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps its temporary files")
def test_compilations_survive_a_restart(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setenv("HOME", str(tmp_path / "not there yet"))
    keep_compilations()
    assert os.environ[SETTING] == str(tmp_path / "not there yet" / ".cache" / "ltx2-tuner" / "compiled")
    unset.delenv(SETTING)
    unset.setenv("XDG_CACHE_HOME", str(tmp_path / "für mich"))
    keep_compilations()
    assert os.environ[SETTING] == str(tmp_path / "für mich" / "ltx2-tuner" / "compiled")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_the_user_chose_stays(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setenv(SETTING, str(tmp_path))
    keep_compilations()
    assert os.environ[SETTING] == str(tmp_path)


def test_without_a_place_to_write_torch_chooses(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setenv("XDG_CACHE_HOME", str(tmp_path))
    unset.setattr(compile_cache.os, "access", lambda _path, _mode: False)
    keep_compilations()
    assert SETTING not in os.environ
