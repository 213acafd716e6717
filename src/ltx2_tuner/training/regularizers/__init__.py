"""One class a regularizer: the extra passes it runs, the loss it adds, the parameters and state it owns."""

from __future__ import annotations

from ltx2_tuner.training.regularizers.base import Regularizer, Regularizers, Trained, Work
from ltx2_tuner.training.regularizers.options import (
    CrepaOptions,
    PreservationOptions,
    RegularizerOptions,
    SelfFlowOptions,
)

__all__ = [
    "CrepaOptions",
    "PreservationOptions",
    "Regularizer",
    "RegularizerOptions",
    "Regularizers",
    "SelfFlowOptions",
    "Trained",
    "Work",
]
