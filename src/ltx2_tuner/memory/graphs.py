"""CUDA graphs of the training pass: forward and backward of a batch shape, recorded once and replayed.

A pass of the transformer is twenty thousand kernels, most of them a few microseconds long: started one by one, the GPU
waits for the CPU. A recorded pass starts them all at once. It also lets the sound stream, whose kernels are too small
to fill the GPU, run beside the picture's: recording forks every block onto a second stream.

Recorded is what every step of a shape does alike. Anything else (evaluation, perturbations, observers, dropout, a
second forward before the first one's backward, a new shape's first pass) runs as usual. This file decides what is
recorded and when; `recorder` makes recordings and replays them.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from ltx2_tuner.memory.device_memory import chain_of, give_back, ran_out, room
from ltx2_tuner.memory.planner import spare
from ltx2_tuner.memory.recorder import Copies, Recorder, Recording, Streams, Velocities, copy_all, tensors_of
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.perturbations import Perturbations

logger = logging.getLogger(__name__)

WARM_UP = 2  # passes before the first recording: compilation and library set-up cannot be recorded
WARM_UP_LATER = 1  # passes of any further shape
_PATIENCE = 4  # times a shape may push out the recordings of others before recording is given up


class _Pass:
    """Lives from a replayed forward until its backward is done or dropped."""


class TrainingGraphs:
    """Stands in place of a model's `forward`, and leaves the gradients of a replayed pass in `parameter.grad`.

    Gradients add up over several passes as they do with autograd; they reach `parameters` alone, and only through
    `backward`, not through `torch.autograd.grad`. They lie where the next pass keeps its activations: whoever wants
    them longer than that has to copy them.

    Args:
        model: with its adapters attached and its blocks compiled; weights stay at their addresses, but for those that
            a BlockStore brings.
        parameters: what is trained.
        state: what else a recording depends on, asked before each pass.
        copies: what passes read in place of the parameters.
        streams: 2 puts the sound stream's kernels beside the picture's; where recording that fails, 1 is tried, which
            takes less memory.

    Attributes:
        works: False when recording has been given up.
        refused: shapes that there was no room for.
    """

    def __init__(
        self,
        model: LTXTransformer,
        parameters: Sequence[nn.Parameter],
        state: Callable[[], Hashable],
        copies: Copies,
        streams: int = 2,
    ) -> None:
        self.model, self.state = model, state
        self.recorder = Recorder(model, parameters, copies, streams)
        self.recordings: dict[Hashable, Recording] = {}
        self.seen: dict[Hashable, int] = {}
        self.refused: set[Hashable] = set()
        self.works = True
        self.pushed_out = 0
        self.anchor = torch.zeros((), requires_grad=True)  # what makes autograd call the backward pass
        self.unfinished: weakref.ref[_Pass] | None = None
        model.forward = self

    @property
    def held(self) -> int:
        """Bytes that recordings have reserved."""
        return self.recorder.held

    def remove(self) -> None:
        """The model's own forward again."""
        self.release()
        vars(self.model).pop("forward", None)

    def release(self) -> None:
        """Give back the memory of all recordings; passes are recorded anew when their shapes come again."""
        self.recordings.clear()
        self.recorder.forget()
        give_back()

    def __call__(
        self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> Velocities:
        if perturbations is not None or not self._applies():
            return self.recorder.eager(video, audio, perturbations)
        key = self._key((video, audio))
        if key not in self.recordings:
            self.seen[key] = self.seen.get(key, 0) + 1
            warm = self.seen[key] > (WARM_UP_LATER if len(self.seen) > 1 else WARM_UP)
            if not warm or key in self.refused or not self._record(key, (video, audio)):
                self._make_room()
                return self.recorder.eager(video, audio)
        token = _Pass()
        self.unfinished = weakref.ref(token)
        tensors = tensors_of((video, audio))
        results = iter(_Replay.apply(self.anchor, self.recorder, self.recordings[key], token, *tensors))
        return tuple(None if stream is None else next(results) for stream in (video, audio))

    def _applies(self) -> bool:
        model = self.model
        if not (torch.is_grad_enabled() and model.training and model.block_outputs is None):
            return False
        if model.block_runner is not self.recorder.runner:
            return False
        under_way = self.unfinished is not None and self.unfinished() is not None
        return self.works and not under_way

    def _key(self, streams: Streams) -> Hashable:
        """What a recording depends on: shapes, dtypes, switches, and where the trained parameters are."""
        trained = self.recorder.parameters
        parts: list[Hashable] = [trained[0].data_ptr(), trained[-1].data_ptr(), self.state()]
        parts.append(torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None)
        for modality in streams:
            for spec in () if modality is None else dataclasses.fields(modality):
                value = getattr(modality, spec.name)
                parts.append((value.shape, value.dtype) if isinstance(value, Tensor) else value)
            parts.append(modality is None)
        return tuple(parts)

    def _make_room(self) -> None:
        """Let go of the recordings where a pass that is not recorded would not fit beside them."""
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self.held
        if not self.recordings or room() + max(unused, 0) > self.held + spare(math.inf):
            return
        self.release()
        self.pushed_out += 1
        if self.pushed_out > _PATIENCE * len(self.seen):
            self._give_up("the memory is too small for the passes of all shapes")

    def _record(self, key: Hashable, streams: Streams) -> bool:
        """Record a pass; False (and never again for this shape) where memory is short."""
        self.recorder.keep_gradients()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the passes run so far hold memory of their own that the recording will need
        needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        left = room() - max(needed - self.held, 0)
        if left < spare(needed):
            reason = f"it takes {needed / 2**30:.1f} GiB, and {left / 2**30:.1f} would be left for validation"
            return self._refuse(key, reason)
        failure, short = self._try_to_record(key, streams)
        if failure is not None and self.recorder.streams == 2:
            logger.info("a pass could not be recorded on two CUDA streams (%s); one is tried", failure)
            self.release()
            self.recorder.streams = 1
            failure, short = self._try_to_record(key, streams)
        if short:
            self.release()
            return self._refuse(key, failure)
        if failure is not None:
            self._give_up(failure)
        return key in self.recordings

    def _try_to_record(self, key: Hashable, streams: Streams) -> tuple[str | None, bool]:
        """None, or what went wrong, and whether memory was short."""
        try:
            self.recordings[key] = self.recorder.record(streams)
            return None, False
        except RuntimeError as error:
            logger.debug("recording failed", exc_info=True)
            failure, short = _told(error), ran_out(error)
        gc.collect()  # only now: the error kept alive all that the pass had made
        return failure, short

    def _refuse(self, key: Hashable, reason: str) -> bool:
        logger.info("a batch shape runs without a CUDA graph: %s", reason)
        self.refused.add(key)
        return False

    def _give_up(self, reason: str) -> None:
        logger.warning("training runs without CUDA graphs: %s", reason)
        self.works = False
        self.release()


class _Replay(torch.autograd.Function):
    """A recorded pass as one node of the graph."""

    @staticmethod
    def forward(ctx, anchor: Tensor, recorder: Recorder, recording: Recording, token: _Pass, *tensors: Tensor):
        copy_all(recording.inputs, tensors)
        recorder.keep_gradients()  # while the GPU copies
        recorder.replay(recording.forward)
        ctx.recorder, ctx.recording, ctx.token = recorder, recording, token
        ctx.set_materialize_grads(False)
        return tuple(velocity.clone() for velocity in recording.velocities if velocity is not None)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        waiting = iter(gradients)
        aligned = [None if velocity is None else next(waiting) for velocity in ctx.recording.velocities]
        _deposit(ctx.recorder, ctx.recording, aligned)
        ctx.token = None
        return (None,) * (4 + len(ctx.recording.inputs))


def _deposit(recorder: Recorder, recording: Recording, gradients: Sequence[Tensor | None]) -> None:
    """Replay the backward pass of the velocities' gradients and add what it finds to `parameter.grad`."""
    for static, gradient in zip(recording.gradients, gradients):
        if static is not None:
            static.zero_() if gradient is None else static.copy_(gradient)
    recorder.keep_gradients()
    recorder.replay(recording.backward)
    held = [parameter for parameter in recording.found if parameter.grad is not None]
    if held:
        torch._foreach_add_([parameter.grad for parameter in held], [recording.found[p] for p in held])
    for parameter, gradient in recording.found.items():
        if parameter.grad is None:
            parameter.grad = gradient


def _told(error: BaseException) -> str:
    """What an error says, and what the first one says, which it came after."""
    said = [str(one).partition("\n")[0] for one in chain_of(error)]
    return said[0] if len(said) == 1 else f"{said[0]}, after: {said[-1]}"
