"""Which state of this program something was made with."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ltx2_tuner import __version__

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def toolkit_version(root: Path = ROOT) -> str:
    """`0.1.0`, with the commit where the program runs from a git checkout: `0.1.0+g1a2b3c4d5e6f`."""
    commit = _commit(root / ".git")
    return f"{__version__}+g{commit[:12]}" if commit else __version__


def _commit(git: Path) -> str | None:
    """The commit that is checked out, read from git's own files; git itself need not be installed."""
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name != head:
            head = _reference(git, name)
    except (OSError, UnicodeDecodeError):
        return None
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None


def _reference(git: Path, name: str) -> str:
    loose = git / name
    if loose.is_file():
        return loose.read_text(encoding="utf-8").strip()
    packed = (git / "packed-refs").read_text(encoding="utf-8")
    return next((line.split()[0] for line in packed.splitlines() if line.endswith(f" {name}")), "")
