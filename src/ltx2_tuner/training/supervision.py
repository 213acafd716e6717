"""Watches whether sound really reaches an audio-video run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

_NOTE_AFTER = 50  # batches without any audio before the one-time note of an unmonitored run


@dataclass(frozen=True)
class SupervisionOptions:
    """Settings of --audio_supervision_*. mode: `off`, `warn` or `error`."""

    mode: str = "off"
    warmup: int = 50
    interval: int = 50
    min_ratio: float = 0.9


class AudioMonitor:
    """Counts the batches of a run and those with real (not silence) audio."""

    def __init__(self, options: SupervisionOptions) -> None:
        self.options = options
        self.expected = 0
        self.supervised = 0

    def observe(self, has_audio: bool) -> None:
        """Count one training batch; warn or stop when too few had audio.

        Raises:
            UserError: the share fell below the limit and the mode is `error`.
        """
        self.expected += 1
        self.supervised += has_audio
        options = self.options
        if options.mode == "off":
            if self.expected == _NOTE_AFTER and self.supervised == 0:
                logger.warning("%d batches in av mode and none had sound: are the audio caches there?", self.expected)
            return
        if self.expected < options.warmup or self.expected % options.interval:
            return
        ratio = self.supervised / self.expected
        if ratio >= options.min_ratio:
            return
        message = (
            f"only {self.supervised} of {self.expected} batches had sound ({ratio:.2f}, wanted at least "
            f"{options.min_ratio:g}); check the audio caches or lower --audio_supervision_min_ratio"
        )
        if options.mode == "error":
            raise UserError(message)
        logger.warning(message)

    def state(self) -> dict[str, int]:
        return {"expected": self.expected, "supervised": self.supervised}

    def load_state(self, state: dict[str, int]) -> None:
        self.expected, self.supervised = state["expected"], state["supervised"]
