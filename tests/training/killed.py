"""Runs ltx2_train_network.py's main and kills itself on the way: python -m tests.training.killed PLACE COUNT ARGUMENTS.

COUNT: at which visit of the place.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable

# Place -> where a function is looked up, and its name; the process dies as it is called.
PLACES = {
    "step": ("ltx2_tuner.training.loop", "Trainer._learn"),
    "optimizer": ("ltx2_tuner.training.loop", "Trainer._step"),
    "checkpoint": ("ltx2_tuner.files", "tensor_bytes"),
    "state": ("ltx2_tuner.training.state", "_fingerprint"),
    "manifest": ("ltx2_tuner.training.state", "_replace_folder"),
    "rotation": ("ltx2_tuner.training.saver", "rotate_state"),
    "sample": ("ltx2_tuner.sampling.preview", "Previewer.make"),
    "validation": ("ltx2_tuner.training.validation", "Validator.measure"),
}


def die() -> None:
    """At once, as from outside: no handler, no flush, no clean-up."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def set_trap(place: str, count: int) -> None:
    """The `count`-th call of the place's function is the last thing this process does."""
    module, path = PLACES[place]
    *holders, function = path.split(".")
    owner: object = importlib.import_module(module)
    for name in holders:
        owner = getattr(owner, name)
    original: Callable = getattr(owner, function)
    calls = 0

    def trapped(*args: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            die()
        return original(*args, **more)

    setattr(owner, function, trapped)


if __name__ == "__main__":
    from ltx2_tuner.cli.ltx2_train_network import main

    set_trap(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
