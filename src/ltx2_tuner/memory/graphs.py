"""CUDA graphs of the training pass: forward and backward of a batch shape, recorded once and replayed.

A pass of the transformer is twenty thousand kernels, most of them a few microseconds long: started one by one, the GPU
waits for the CPU. A recorded pass starts them all at once. It also lets the sound stream, whose kernels are too small
to fill the GPU, run beside the picture's: recording forks every block onto a second stream.

Recorded is what every step of a shape does alike. Anything else (evaluation, perturbations, observers, dropout, a
second forward before the first one's backward, a new shape's first pass) runs as usual.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.block import BasicAVTransformerBlock
from ltx2_tuner.models.transformer.model import run_block
from ltx2_tuner.models.transformer.perturbations import Perturbations

logger = logging.getLogger(__name__)

Streams = tuple[Modality | None, Modality | None]
Velocities = tuple[Tensor | None, Tensor | None]
MEMORY = 1.25  # times what a pass needs has to be free: what a recording holds, validation and previews cannot use
WARM_UP = 2  # passes of a shape before it is recorded: compilation and library set-up cannot be


class TwoStreams:
    """A block runner that puts the sound stream's parts on a second CUDA stream; a block starts and ends on the first.

    What one stream made and the other reads is held in `kept`, so that its memory is not given out again while the
    other still reads.
    """

    recomputes = True

    def __init__(self) -> None:
        self.side = torch.cuda.Stream(priority=-1)
        self.kept: list[object] = []

    def __call__(
        self, block: BasicAVTransformerBlock, index: int, *arguments: object, recompute: bool = False
    ) -> Velocities:
        video, audio, video_inputs, audio_inputs, skips = arguments
        if video is None or audio is None or skips is not None or not (video_inputs.updated and audio_inputs.updated):
            return run_block(block, index, *arguments, recompute=recompute)
        main, side = torch.cuda.current_stream(), self.side
        self.kept.append(arguments)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            audio = block.open_audio(audio, audio_inputs, None, recompute=recompute)
        video = block.open_video(video, video_inputs, None, recompute=recompute)
        opened = (video, audio)
        side.wait_stream(main)
        main.wait_stream(side)
        with torch.cuda.stream(side):
            audio = block.close_audio(*opened[::-1], audio_inputs, video_inputs, None, recompute=recompute)
        video = block.close_video(*opened, video_inputs, audio_inputs, None, recompute=recompute)
        main.wait_stream(side)
        self.kept += [opened, (video, audio)]
        return video, audio


@dataclass
class _Recording:
    """A recorded pass and the tensors it reads and writes."""

    inputs: Streams
    velocities: Velocities
    gradients: Velocities  # of the velocities
    reached: list[nn.Parameter]  # parameters that get a gradient
    forward: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    backward: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)


class _Pass:
    """Lives from a replayed forward until its backward is done or dropped."""


class TrainingGraphs:
    """Stands in place of a model's `forward`, and leaves the gradients of a replayed pass in `parameter.grad`.

    Gradients add up over several passes as they do with autograd; they reach `parameters` alone, and only through
    `backward`, not through `torch.autograd.grad`.

    Args:
        model: with its adapters attached and its blocks compiled; weights stay at their addresses.
        parameters: what is trained.
        state: what else a recording depends on, asked before each pass.
        leaves: a context in which passes read fresh leaves in place of the parameters, given by parameter (a leaf that
            was used on one stream cannot be recorded on another).
        streams: 2 puts the sound stream's kernels beside the picture's.
    """

    def __init__(
        self,
        model: LTXTransformer,
        parameters: Sequence[nn.Parameter],
        state: Callable[[], Hashable],
        leaves: Callable[[], AbstractContextManager[Mapping[nn.Parameter, Tensor]]],
        streams: int = 2,
    ) -> None:
        self.model, self.parameters, self.state, self.leaves = model, list(parameters), state, leaves
        self.eager = model.forward
        self.recordings: dict[Hashable, _Recording] = {}
        self.seen: dict[Hashable, int] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.two_streams = TwoStreams()
        self.streams = streams
        self.anchor = torch.zeros((), requires_grad=True)  # what makes autograd call the backward pass
        self.unfinished: weakref.ref[_Pass] | None = None
        # Gradients of the pass replayed last, one flat tensor for all shapes.
        first = self.parameters[0]
        flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)
        pieces = flat.split([p.numel() for p in self.parameters])
        self.grads = {p: piece.view_as(p) for p, piece in zip(self.parameters, pieces)}
        model.forward = self

    def remove(self) -> None:
        """The model's own forward again."""
        self.recordings.clear()
        del self.model.forward

    def __call__(
        self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> Velocities:
        key = self._key((video, audio))
        if perturbations is not None or not self._applies():
            return self.eager(video, audio, perturbations)
        if key not in self.recordings:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= WARM_UP or not self._record(key, (video, audio)):
                return self.eager(video, audio)
        token = _Pass()
        self.unfinished = weakref.ref(token)
        results = iter(_Replay.apply(self.anchor, self, key, token, *_tensors((video, audio))))
        return tuple(None if stream is None else next(results) for stream in (video, audio))

    def _applies(self) -> bool:
        model = self.model
        if not (torch.is_grad_enabled() and model.training and model.block_outputs is None):
            return False
        if model.block_runner is not run_block or (self.unfinished is not None and self.unfinished() is not None):
            return False
        return self.pool is not None

    def _key(self, streams: Streams) -> Hashable:
        """What a recording depends on: shapes, dtypes, switches, and where the trained parameters are."""
        parts: list[Hashable] = [self.parameters[0].data_ptr(), self.parameters[-1].data_ptr(), self.state()]
        parts.append(torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None)
        for modality in streams:
            for spec in () if modality is None else dataclasses.fields(modality):
                value = getattr(modality, spec.name)
                parts.append((value.shape, value.dtype) if isinstance(value, Tensor) else value)
            parts.append(modality is None)
        return tuple(parts)

    def _record(self, key: Hashable, streams: Streams) -> bool:
        """Record a pass; False (and never again) where that fails for want of memory or support."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the passes run so far hold memory of their own that the recording will need
        if torch.cuda.mem_get_info()[0] < MEMORY * (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()):
            logger.info("training runs without CUDA graphs: the memory of a recorded pass would be missing elsewhere")
            self.pool = None
            return False
        try:
            with self.leaves() as leaves:
                self.recordings[key] = self._recorded(streams, leaves)
        except RuntimeError as error:  # out of memory is one, too
            logger.warning("training runs without CUDA graphs: %s", str(error).splitlines()[0])
            logger.debug("recording failed", exc_info=True)
            self.recordings.clear()
            self.pool = None
        finally:
            self.two_streams.kept.clear()
            self.model.block_runner = run_block
        return key in self.recordings

    def _recorded(self, streams: Streams, leaves: Mapping[nn.Parameter, Tensor]) -> _Recording:
        inputs = tuple(None if modality is None else _copied(modality) for modality in streams)
        recording = _Recording(inputs, (None, None), (None, None), [])
        if self.streams == 2:
            self.model.block_runner = self.two_streams
        with self._recording_into(recording.forward):
            velocities = self.eager(*inputs)
        present = [velocity for velocity in velocities if velocity is not None]
        recording.velocities = tuple(None if velocity is None else velocity.detach() for velocity in velocities)
        gradients = [torch.zeros_like(velocity) for velocity in present]
        waiting = iter(gradients)
        recording.gradients = tuple(None if velocity is None else next(waiting) for velocity in velocities)
        with self._recording_into(recording.backward):
            wanted = [leaves[parameter] for parameter in self.parameters]
            found = torch.autograd.grad(present, wanted, gradients, allow_unused=True)
            pairs = [(p, grad) for p, grad in zip(self.parameters, found) if grad is not None]
            torch._foreach_copy_([self.grads[p] for p, _ in pairs], [grad for _, grad in pairs])
        recording.reached = [p for p, _ in pairs]
        return recording

    @contextlib.contextmanager
    def _recording_into(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Other threads (data loading) may allocate pinned memory meanwhile, hence thread_local.
        side = self.two_streams.side
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            side.wait_stream(torch.cuda.current_stream())
            try:
                yield
            finally:  # also when something failed: a recording ends properly only with all streams back
                torch.cuda.current_stream().wait_stream(side)

    def deposit(self, recording: _Recording, gradients: Sequence[Tensor | None]) -> None:
        """Replay the backward pass of the velocities' gradients and add what it finds to `parameter.grad`."""
        for static, gradient in zip(recording.gradients, gradients):
            if static is not None:
                static.zero_() if gradient is None else static.copy_(gradient)
        for parameter in self.parameters:
            if parameter.grad is self.grads[parameter]:  # of an earlier pass: about to be overwritten
                parameter.grad = parameter.grad.clone()
        recording.backward.replay()
        held = [p for p in recording.reached if p.grad is not None]
        if held:
            torch._foreach_add_([p.grad for p in held], [self.grads[p] for p in held])
        for parameter in recording.reached:
            if parameter.grad is None:
                parameter.grad = self.grads[parameter]


class _Replay(torch.autograd.Function):
    """A recorded pass as one node of the graph."""

    @staticmethod
    def forward(ctx, anchor: Tensor, graphs: TrainingGraphs, key: Hashable, token: _Pass, *tensors: Tensor):
        recording = graphs.recordings[key]
        torch._foreach_copy_(_tensors(recording.inputs), list(tensors))
        recording.forward.replay()
        ctx.graphs, ctx.recording, ctx.token = graphs, recording, token
        ctx.set_materialize_grads(False)
        return tuple(velocity.clone() for velocity in recording.velocities if velocity is not None)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        waiting = iter(gradients)
        aligned = [None if velocity is None else next(waiting) for velocity in ctx.recording.velocities]
        ctx.graphs.deposit(ctx.recording, aligned)
        ctx.token = None
        return (None,) * (4 + len(_tensors(ctx.recording.inputs)))


def _tensors(streams: Streams) -> list[Tensor]:
    """Every tensor of both records, in a fixed order."""
    values = (
        getattr(modality, spec.name)
        for modality in streams
        if modality is not None
        for spec in dataclasses.fields(modality)
    )
    return [value for value in values if isinstance(value, Tensor)]


def _copied(modality: Modality) -> Modality:
    values = {spec.name: getattr(modality, spec.name) for spec in dataclasses.fields(modality)}
    copies = {name: value.detach().clone() for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(modality, **copies)
