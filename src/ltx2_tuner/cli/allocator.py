"""How the device's memory is given out."""

from __future__ import annotations

import os

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 and later, and before


def keep_memory_in_one_piece() -> None:
    """Have torch give out the device's memory from segments that grow, which leaves fewer gaps that nothing fits into.

    Call it before anything is on the device. What the user has set stays.
    """
    if not set(_SETTINGS) & os.environ.keys():
        os.environ.update(dict.fromkeys(_SETTINGS, "expandable_segments:True"))
