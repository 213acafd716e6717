"""Watches whether sound really reaches an audio-video run, and says what helps when it does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

_NOTE_AFTER = 50  # batches in a row without sound before a note
_RATIO_DECAY = 0.98
_RATIO_STEPS = 200  # optimizer steps before the ratio of the losses is judged
_LOW_RATIO = 0.2
_FULL_SHARE = 0.999


@dataclass(frozen=True)
class SupervisionOptions:
    """Settings of --audio_supervision_*. mode: `off`, `warn` or `error`."""

    mode: str = "off"
    warmup: int = 50
    interval: int = 50
    min_ratio: float = 0.9


class AudioMonitor:
    """Counts the batches of a run and those with real (not silence) audio, and follows the ratio of the losses."""

    def __init__(self, options: SupervisionOptions) -> None:
        self.options = options
        self.expected = 0
        self.supervised = 0
        self.ratio = 0.0
        self.ratio_steps = 0
        self._unheard = 0  # batches since the last one with sound

    @property
    def share(self) -> float:
        """Share of the batches so far that had sound."""
        return self.supervised / max(self.expected, 1)

    def observe(self, has_audio: bool) -> None:
        """Count one training batch; warn or stop when too few had audio.

        Raises:
            UserError: the share fell below the limit and the mode is `error`.
        """
        self.expected += 1
        self.supervised += has_audio
        self._unheard = 0 if has_audio else self._unheard + 1
        options = self.options
        if options.mode == "off":
            if self._unheard == _NOTE_AFTER:
                logger.warning(
                    "%d batches in a row without sound (%d of %d so far had some): raise num_repeats of the datasets "
                    "with sound, or use --audio_batch_probability",
                    _NOTE_AFTER,
                    self.supervised,
                    self.expected,
                )
            return
        if self.expected < options.warmup or self.expected % options.interval:
            return
        report = f"{self.supervised} of {self.expected} batches had sound ({self.share:.2f}"
        if self.share >= options.min_ratio:
            logger.info("%s)", report)
            return
        message = (
            f"only {report}, wanted at least {options.min_ratio:g}); check the audio caches or lower "
            "--audio_supervision_min_ratio"
        )
        if options.mode == "error":
            raise UserError(message)
        logger.warning(message)

    def follow(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take the numbers of an optimizer step; returns more of them for the log.

        Once sound has been learned far ahead of the picture for a while, a warning says what dampens it.
        """
        found = {"audio/supervised_share": self.share}
        ratio = metrics.get("loss/audio_video_ratio")
        if ratio is not None:
            self.ratio_steps += 1
            # Equal weights at first, so that the first steps do not linger.
            decay = min(_RATIO_DECAY, 1 - 1 / self.ratio_steps)
            self.ratio = decay * self.ratio + (1 - decay) * ratio
            if self.ratio_steps == _RATIO_STEPS and self.ratio < _LOW_RATIO:
                logger.warning(
                    "the sound loss is %.2f of the picture loss after %d steps: sound may be overfitted before the "
                    "picture is learned; use --audio_loss_balance_mode ema_mag, a lower --audio_lr or "
                    "--audio_loss_weight",
                    self.ratio,
                    _RATIO_STEPS,
                )
        if self.ratio_steps:
            found["loss/audio_video_ratio_ema"] = self.ratio
        return found

    def state(self) -> dict[str, float]:
        return {
            "expected": self.expected,
            "supervised": self.supervised,
            "ratio": self.ratio,
            "ratio_steps": self.ratio_steps,
        }

    def load_state(self, state: Mapping[str, float]) -> None:
        self.expected, self.supervised = int(state["expected"]), int(state["supervised"])
        # States of earlier versions lack the ratio.
        self.ratio, self.ratio_steps = float(state.get("ratio", 0.0)), int(state.get("ratio_steps", 0))


def audio_plan(share: float, *, without_sound: str | None, balance: str) -> str:
    """One line for the start of an av run: how much of it trains sound, what the other batches do, what could help.

    Args:
        share: share of an epoch's batches with sound.
        without_sound: what is done in batches without sound, None for nothing.
        balance: the mode of the automatic audio weight.
    """
    line = f"audio plan: sound in {100 * share:.0f} % of the batches"
    if share < _FULL_SHARE:
        line += f", the others train {without_sound or 'the picture alone'}"
    line += f", audio weight {'fixed' if balance == 'none' else f'by {balance}'}"
    if share < _FULL_SHARE and without_sound is None and balance == "none":
        line += (
            "; sound may drift in the others, which --audio_silence_regularizer or --audio_dop hold back and "
            "--audio_loss_balance_mode inv_freq outweighs"
        )
    return line
