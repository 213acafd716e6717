"""Training modes: each turns a batch into model inputs and targets."""

from __future__ import annotations

from ltx2_tuner.training.modes.audio import AudioMode
from ltx2_tuner.training.modes.av import AVMode
from ltx2_tuner.training.modes.base import Compute, Mode, ModeOptions, Prepared
from ltx2_tuner.training.modes.video import VideoMode

MODES: dict[str, type[Mode]] = {mode.name: mode for mode in (VideoMode, AVMode, AudioMode)}

__all__ = ["MODES", "AVMode", "AudioMode", "Compute", "Mode", "ModeOptions", "Prepared", "VideoMode"]
