"""Make the environment, then run ruff and the tests: the command that decides whether a commit is good.

python scripts/test.py                the default tests
python scripts/test.py --oracle       comparisons with diffusers and ltx-core, in an environment of their own
python scripts/test.py -- -m slow     everything after -- goes to pytest
"""

from __future__ import annotations

import argparse
import sys

import environment

# One thread a worker: the tensors are tiny, and two workers on two cores must not fight for them.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", action="store_true", help="run the tests marked oracle, in their own environment")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    if arguments.oracle:
        python = environment.ensure(".venv-oracle", ("-e", ".[dev,oracle]"), ("--no-deps", "ltx-core==1.0.0"))
        return environment.run(python, "-m", "pytest", "-m", "oracle", *arguments.pytest, **THREADS)
    python = environment.ensure(".venv", ("-e", ".[dev]"))
    for check in (("check", "."), ("format", "--check", ".")):
        if status := environment.run(python, "-m", "ruff", *check):
            return status
    return environment.run(python, "-m", "pytest", "-n", "auto", *arguments.pytest, **THREADS)


if __name__ == "__main__":
    sys.exit(main())
