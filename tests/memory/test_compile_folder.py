"""Where a run has torch keep its compilations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ltx2_tuner.memory import compile_cache
from ltx2_tuner.memory.compile_cache import keep_compilations

SETTING = "TORCHINDUCTOR_CACHE_DIR"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows keeps its temporary files")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(SETTING, "")  # taken back at the end, whatever is set meanwhile
    monkeypatch.delenv(SETTING)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return monkeypatch


def test_compilations_survive_a_restart(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setenv("HOME", str(tmp_path / "not there yet"))
    keep_compilations()
    assert os.environ[SETTING] == str(tmp_path / "not there yet" / ".cache" / "ltx2-tuner" / "compiled")
    assert Path(os.environ[SETTING]).is_dir()
    unset.delenv(SETTING)
    unset.setenv("XDG_CACHE_HOME", str(tmp_path / "für mich"))
    keep_compilations()
    assert os.environ[SETTING] == str(tmp_path / "für mich" / "ltx2-tuner" / "compiled")


def test_a_folder_that_the_user_chose_stays(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setenv(SETTING, str(tmp_path))
    keep_compilations()
    assert os.environ[SETTING] == str(tmp_path)


@pytest.mark.parametrize("fault", ["a file", "a dangling link", "forbidden", "read-only"])
def test_without_a_place_to_write_torch_chooses(unset: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    cache = tmp_path / ".cache"
    unset.setenv("HOME", str(tmp_path))
    if fault == "a file":
        cache.touch()
    elif fault == "a dangling link":
        cache.symlink_to(tmp_path / "nowhere" / "at all")
    elif fault == "forbidden":

        def refuse(*_arguments: object, **_keywords: object) -> None:
            raise PermissionError(13, "Permission denied")

        unset.setattr(Path, "mkdir", refuse)
        unset.setattr(Path, "exists", refuse)  # as in a home that cannot be searched
    else:
        unset.setattr(compile_cache.os, "access", lambda _path, _mode: False)
    keep_compilations()
    assert SETTING not in os.environ
