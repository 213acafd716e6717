"""The version with its commit, as saved files tell it."""

from __future__ import annotations

import pytest

from ltx2_tuner import __version__
from ltx2_tuner.version import toolkit_version

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, __version__),
        ({"HEAD": f"{COMMIT}\n"}, f"{__version__}+g0123456789ab"),
        ({"HEAD": "ref: refs/heads/main\n", "refs/heads/main": f"{COMMIT}\n"}, f"{__version__}+g0123456789ab"),
        (
            {"HEAD": "ref: refs/heads/main\n", "packed-refs": f"# pack-refs\n{COMMIT} refs/heads/main\n"},
            f"{__version__}+g0123456789ab",
        ),
        ({"HEAD": "ref: refs/heads/new\n", "packed-refs": ""}, __version__),
        ({"HEAD": "something else"}, __version__),
    ],
)
def test_the_commit_is_read_without_git(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / ".git" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert toolkit_version(tmp_path) == expected
