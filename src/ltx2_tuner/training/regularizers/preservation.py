"""Keep what the plain model knows: blank and class prompts, and the opposite, divergence on the training prompts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ltx2_tuner.training.losses import element_loss, reduce_loss
from ltx2_tuner.training.modes import Prepared
from ltx2_tuner.training.regularizers.base import Regularizer, Work
from ltx2_tuner.training.regularizers.passes import Passes, Predictions
from ltx2_tuner.training.regularizers.prompts import Prompt

DIVERGENCE_SHARE = 0.1  # of the task loss, the most that prior divergence may take off


class PromptPreservation(Regularizer):
    """m * |on - off|^2 with a prompt in place of the batch's text: blank preservation and DOP.

    A prompt without a sound embedding acts on the picture alone.
    """

    cost = "+2 forward +1 backward"

    def __init__(self, metric: str, passes: Passes, prompt: Prompt, multiplier: float) -> None:
        self.metric = metric
        self.passes = passes
        self.prompt = prompt
        self.multiplier = multiplier

    def separate_loss(self, work: Work) -> Tensor:
        inputs = with_prompt(work.prepared, self.prompt)
        off = self.passes.plain(inputs)
        return self.multiplier * squared_difference(inputs, self.passes.trained(inputs), off)


class PriorDivergence(Regularizer):
    """-m * |on - off|^2 with the batch's own text, at most a share of the task loss."""

    metric = "loss/prior_div"
    cost = "+1 forward"

    def __init__(self, passes: Passes, multiplier: float) -> None:
        self.passes = passes
        self.multiplier = multiplier
        self._off: Predictions = (None, None)

    def prepare(self, work: Work) -> None:
        # Before the main forward, where it needs no memory beside that pass's activations. Members that come earlier
        # have changed the inputs already.
        self._off = self.passes.plain(work.prepared)

    def loss(self, work: Work) -> Tensor:
        off, self._off = self._off, (None, None)
        is_picture = work.video is not None
        on = (work.video, None) if is_picture else (None, work.audio)
        size = self.multiplier * squared_difference(work.prepared, on, off)
        limit = DIVERGENCE_SHARE * work.task.abs()
        factor = torch.where(size.detach() > limit, limit / size.detach(), 1.0)
        return -size * factor


def with_prompt(prepared: Prepared, prompt: Prompt) -> Prepared:
    """The same inputs with another text; sound is left out where the prompt has none for it."""
    video, audio = prepared.video, prepared.audio
    if video is not None:
        video = prompt.on(video, prompt.video)
    if audio is not None:
        audio = None if prompt.audio is None else prompt.on(audio, prompt.audio)
    return dataclasses.replace(prepared, video=video, audio=audio)


def squared_difference(prepared: Prepared, on: Predictions, off: Predictions) -> Tensor:
    """Mean squared error (float32) over the tokens that the main loss counts, summed over the streams in `on`."""
    tasks = (prepared.video_task, prepared.audio_task)
    parts = [
        reduce_loss(element_loss(mine, base), task.mask).mean
        for task, mine, base in zip(tasks, on, off)
        if mine is not None
    ]
    return sum(parts[1:], parts[0])
