"""Audio DOP: on batches without sound, keep what the plain model would have sounded like."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ltx2_tuner.training.modes import AVMode, Prepared
from ltx2_tuner.training.regularizers.base import Regularizer, Work
from ltx2_tuner.training.regularizers.passes import Passes
from ltx2_tuner.training.regularizers.preservation import squared_difference


class AudioDop(Regularizer):
    """m * |on - off|^2 of the sound that goes with the step's noisy picture, starting from noised silence.

    Args:
        mode: fills items without sound with silence, whose noise level is the picture's.
    """

    metric = "loss/audio_dop"
    cost = "+2 forward +1 backward on batches without sound"

    def __init__(self, passes: Passes, mode: AVMode, multiplier: float) -> None:
        self.passes = passes
        self.mode = mode
        self.multiplier = multiplier

    def separate_loss(self, work: Work) -> Tensor | None:
        if work.prepared.has_audio:
            return None
        inputs = self._with_silence(work)
        _, off = self.passes.plain(inputs)
        _, on = self.passes.trained(inputs)
        return self.multiplier * squared_difference(inputs, (None, on), (None, off))

    def _with_silence(self, work: Work) -> Prepared:
        """The step's picture and text once more, from the same draws, now with noised silence."""
        return self.mode.prepare(work.batch, work.draws.again())


def silent_mode(mode: AVMode, silence: Tensor | None) -> AVMode:
    """The mode of the run, but with encoded silence (T, C) where an item has no sound."""
    options = dataclasses.replace(mode.options, silence_regularizer=True, independent_audio=False)
    return type(mode)(options, mode.compute, silence)
