"""Makes the project's own virtual environment with the pinned packages. Standard library only, Linux and Windows."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
SUPPORTED = ((3, 11), (3, 13))


def ensure(directory: str, *requirement_sets: tuple[str, ...]) -> Path:
    """The Python of the virtual environment `directory`, made and filled when it is missing or out of date.

    Args:
        directory: name of the folder under the repository root.
        requirement_sets: arguments of one `pip install` each; all of them see the constraints file.
    """
    low, high = SUPPORTED
    if not low <= sys.version_info[:2] <= high:
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"error: this is Python {found}; ltx2-tuner needs 3.{low[1]} to 3.{high[1]}: start it with one of those"
        )
    folder = ROOT / directory
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed.sha256"
    wanted = _fingerprint(requirement_sets)
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} (torch is large; the first time takes minutes)", flush=True)
    venv.EnvBuilder(with_pip=True, clear=folder.exists()).create(folder)
    for requirements in requirement_sets:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", CONSTRAINTS]
        if subprocess.run([*map(str, command), *requirements], cwd=ROOT).returncode:
            sys.exit(f"error: pip could not install {' '.join(requirements)}; its message is above")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run(python: Path, *arguments: str | Path, **variables: str) -> int:
    """Run the environment's Python in the repository root; returns its exit status."""
    return subprocess.run([str(python), *map(str, arguments)], cwd=ROOT, env={**os.environ, **variables}).returncode


def _fingerprint(requirement_sets: tuple[tuple[str, ...], ...]) -> str:
    digest = hashlib.sha256(repr((requirement_sets, sys.version_info[:2])).encode())
    for file in (CONSTRAINTS, ROOT / "pyproject.toml"):
        digest.update(file.read_bytes())
    return digest.hexdigest()
