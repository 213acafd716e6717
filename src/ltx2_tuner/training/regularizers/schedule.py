"""How the weight of a regularizer changes over a run."""

from __future__ import annotations

import math


def schedule_factor(kind: str, step: int, warmup: int, end: int) -> float:
    """The factor after `step` optimizer steps: from 0 to 1 over `warmup` steps, then as `kind` says until `end`.

    Args:
        kind: `constant`, or a decay to 0 that is `linear` or a half `cosine`.
        end: step at which a decay reaches 0.
    """
    if step < warmup:
        return step / warmup
    share = min((step - warmup) / max(end - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - share
    if kind == "cosine":
        return (1.0 + math.cos(math.pi * share)) / 2
    return 1.0
