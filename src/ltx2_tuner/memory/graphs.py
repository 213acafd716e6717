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
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ltx2_tuner.memory.device_memory import give_back, ran_out, room
from ltx2_tuner.memory.planner import spare
from ltx2_tuner.memory.streaming import BlockStore, RingState
from ltx2_tuner.memory.two_streams import TwoStreams
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.model import run_block
from ltx2_tuner.models.transformer.perturbations import Perturbations
from ltx2_tuner.side_by_side import empty

logger = logging.getLogger(__name__)

Streams = tuple[Modality | None, Modality | None]
Velocities = tuple[Tensor | None, Tensor | None]
WARM_UP = 2  # passes before the first recording: compilation and library set-up cannot be recorded
WARM_UP_LATER = 1  # passes of any further shape
_TOLERANCE = 1e-2  # between a recorded and an unrecorded pass, relative; attention gradients vary from run to run
_PATIENCE = 4  # times a shape may push out the recordings of others before recording is given up


class Copies(Protocol):
    """What passes read in place of the trained parameters (lora.working_copies.WorkingCopies)."""

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        """A context in which passes read fresh leaves, which it lists."""

    def of_masters(self, gradients: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that have a gradient, given those of the leaves."""


@dataclass
class _Half:
    """The forward or the backward pass, and the ring's states before and after it."""

    graph: torch.cuda.CUDAGraph
    before: RingState | None
    after: RingState | None = None


@dataclass
class _Recording:
    """A recorded pass, and the tensors it reads and writes."""

    inputs: list[Tensor]
    velocities: Velocities = (None, None)
    gradients: Velocities = (None, None)  # of the velocities
    found: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # gradients that the pass leaves
    forward: _Half | None = None
    backward: _Half | None = None


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
        copies: what passes read in place of the parameters (a leaf that was used on one stream cannot be recorded on
            another).
        streams: 2 puts the sound stream's kernels beside the picture's; where recording that fails, 1 is tried, which
            takes less memory.
    """

    def __init__(
        self,
        model: LTXTransformer,
        parameters: Sequence[nn.Parameter],
        state: Callable[[], Hashable],
        copies: Copies,
        streams: int = 2,
    ) -> None:
        self.model, self.parameters, self.state, self.copies = model, list(parameters), state, copies
        self.eager = model.forward
        self.store = model.block_runner if isinstance(model.block_runner, BlockStore) else None
        self.runner = model.block_runner
        self.recordings: dict[Hashable, _Recording] = {}
        self.grads: dict[nn.Parameter, Tensor] = {}  # of the pass replayed last, in one flat tensor for all shapes
        self.seen: dict[Hashable, int] = {}
        self.refused: set[Hashable] = set()
        self.pool = torch.cuda.graph_pool_handle()
        self.held = 0  # bytes of the pool
        self.pushed_out = 0
        self.main = torch.cuda.Stream(priority=-1)  # the picture's kernels go first: the sound's wait for gaps
        self.two_streams = TwoStreams()
        self.streams = streams
        self.anchor = torch.zeros((), requires_grad=True)  # what makes autograd call the backward pass
        self.unfinished: weakref.ref[_Pass] | None = None
        # The leaves of a recording belong to no other pass, whose stream could differ (torch 2.10 and later warn).
        getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda enabled: None)(False)
        model.forward = self

    def remove(self) -> None:
        """The model's own forward again."""
        self.release()
        vars(self.model).pop("forward", None)

    def release(self) -> None:
        """Give back the memory of all recordings; passes are recorded anew when their shapes come again."""
        self.recordings.clear()
        self.grads = {}
        self.held = 0
        if self.pool is not None:
            self.pool = torch.cuda.graph_pool_handle()
        give_back()

    def __call__(
        self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> Velocities:
        if perturbations is not None or not self._applies():
            return self.eager(video, audio, perturbations)
        key = self._key((video, audio))
        if key not in self.recordings:
            self.seen[key] = self.seen.get(key, 0) + 1
            warm = self.seen[key] > (WARM_UP_LATER if len(self.seen) > 1 else WARM_UP)
            if not warm or key in self.refused or not self._record(key, (video, audio)):
                self._make_room()
                return self.eager(video, audio)
        token = _Pass()
        self.unfinished = weakref.ref(token)
        results = iter(_Replay.apply(self.anchor, self, self.recordings[key], token, *_tensors((video, audio))))
        return tuple(None if stream is None else next(results) for stream in (video, audio))

    def _applies(self) -> bool:
        model = self.model
        if not (torch.is_grad_enabled() and model.training and model.block_outputs is None):
            return False
        if model.block_runner is not self.runner or (self.unfinished is not None and self.unfinished() is not None):
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

    def _make_room(self) -> None:
        """Let go of the recordings where a pass that is not recorded would not fit beside them."""
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self.held
        if not self.recordings or room() + max(unused, 0) > self.held + spare(math.inf):
            return
        self.release()
        self.pushed_out += 1
        if self.pushed_out > _PATIENCE * len(self.seen):
            self._give_up("the memory is too small for the passes of all shapes")

    def _give_up(self, reason: str) -> None:
        logger.warning("training runs without CUDA graphs: %s", reason)
        self.release()
        self.pool = None

    def _record(self, key: Hashable, streams: Streams) -> bool:
        """Record a pass; False (and never again for this shape) where memory is short."""
        self.keep_gradients()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the passes run so far hold memory of their own that the recording will need
        needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        left = room() - max(needed - self.held, 0)
        if left < spare(needed):
            reason = f"it takes {needed / 2**30:.1f} GiB, and {left / 2**30:.1f} would be left for validation"
            return self._refuse(key, reason)
        failure, short = self._try_to_record(key, streams)
        if failure is not None and self.streams == 2:
            logger.info("a pass could not be recorded on two CUDA streams (%s); one is tried", failure)
            self.release()
            self.streams = 1
            failure, short = self._try_to_record(key, streams)
        if short:
            self.release()
            return self._refuse(key, failure)
        if failure is not None:
            self._give_up(failure)
        return key in self.recordings

    def _try_to_record(self, key: Hashable, streams: Streams) -> tuple[str | None, bool]:
        """None, or what went wrong, and whether memory was short."""
        failure, short = None, False
        try:
            expected = self._unrecorded(streams)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with self.copies.recorded() as leaves:
                self.recordings[key] = self._recorded(streams, leaves)
            self.held += torch.cuda.memory_reserved() - before
            self._check(self.recordings[key], expected)
        except RuntimeError as error:
            logger.debug("recording failed", exc_info=True)
            failure, short = _told(error), ran_out(error)
        finally:
            self._clean_up()
        if failure is not None:  # only now: the error kept alive all that the pass had made
            self.recordings.pop(key, None)
            gc.collect()
        return failure, short

    def _refuse(self, key: Hashable, reason: str) -> bool:
        logger.info("a batch shape runs without a CUDA graph: %s", reason)
        self.refused.add(key)
        return False

    def _clean_up(self) -> None:
        """After a recording: the model runs its blocks as before."""
        self.two_streams.kept.clear()
        self.model.block_runner = self.runner
        if self.store is not None:
            self.store.run = run_block
            self.store.empty_ring()

    def _unrecorded(self, streams: Streams) -> list[Tensor]:
        """Velocities of a pass and the gradients they give when they are their own gradient, on the host."""
        with self.copies.recorded() as leaves:
            present = [velocity for velocity in self.eager(*streams) if velocity is not None]
            found = torch.autograd.grad(present, leaves, present, allow_unused=True)
            results = present + [gradient for _, gradient in self.copies.of_masters(found)]
            return [result.detach().cpu() for result in results]

    def _check(self, recording: _Recording, expected: Sequence[Tensor]) -> None:
        """Replay a new recording twice (the ring starts empty, then full) on the inputs it was made with.

        Raises:
            RuntimeError: it does not give what the same pass gave unrecorded.
        """
        self._clean_up()
        for _ in range(2):
            self.replay(recording.forward)
            present = [velocity for velocity in recording.velocities if velocity is not None]
            count = len(present)
            agree = [_agree(present, expected[:count])]
            for gradient, velocity in zip((g for g in recording.gradients if g is not None), present):
                gradient.copy_(velocity)
            self.replay(recording.backward)
            agree.append(_agree(list(recording.found.values()), expected[count:]))
            if not all(agree):
                raise RuntimeError("a recorded pass gave other numbers than the same pass unrecorded")

    def _recorded(self, streams: Streams, leaves: list[Tensor]) -> _Recording:
        copies = tuple(None if modality is None else _copied(modality) for modality in streams)
        recording = _Recording(_tensors(copies))
        if self.streams == 2 and self.store is not None:
            self.store.run = self.two_streams
        elif self.streams == 2:
            self.model.block_runner = self.two_streams
        with self._recording_half() as recording.forward:
            velocities = self.eager(*copies)
        present = [velocity for velocity in velocities if velocity is not None]
        recording.velocities = tuple(None if velocity is None else velocity.detach() for velocity in velocities)
        gradients = [torch.zeros_like(velocity) for velocity in present]
        waiting = iter(gradients)
        recording.gradients = tuple(None if velocity is None else next(waiting) for velocity in velocities)
        with self._recording_half() as recording.backward:
            found = torch.autograd.grad(present, leaves, gradients, allow_unused=True)
            pairs = self.copies.of_masters(found)
            # Made when the activations are gone, in their memory.
            self.grads = self.grads or dict(zip(self.parameters, _beside_each_other(self.parameters)))
            recording.found = {parameter: self.grads[parameter] for parameter, _ in pairs}
            _copy_all(list(recording.found.values()), [gradient for _, gradient in pairs])
        return recording

    @contextlib.contextmanager
    def _recording_half(self) -> Iterator[_Half]:
        main, sides = self.main, [self.two_streams.side] if self.streams == 2 else []
        half = _Half(torch.cuda.CUDAGraph(), self._ring())
        # Other threads (data loading) may allocate pinned memory meanwhile, hence thread_local.
        capture = torch.cuda.graph(half.graph, pool=self.pool, stream=main, capture_error_mode="thread_local")
        with torch.cuda.stream(main), capture:  # a capture that fails to end leaves its stream the current one
            for side in sides:
                side.wait_stream(main)
            store = None if half.before is None else self.store.recording(half.before, main, *sides)
            try:
                with store or contextlib.nullcontext():
                    yield half
            finally:  # also when something failed: a recording ends properly only with all streams back
                for side in sides:
                    main.wait_stream(side)
        half.after = self._ring()

    def _ring(self) -> RingState | None:
        return None if self.store is None else self.store.state()

    def keep_gradients(self) -> None:
        """Copy gradients of an earlier pass of this step out of the memory that is about to be overwritten."""
        held = [parameter for parameter, gradient in self.grads.items() if parameter.grad is gradient]
        if held:
            copies = _beside_each_other(held)
            _copy_all(copies, [parameter.grad for parameter in held])
            for parameter, gradient in zip(held, copies):
                parameter.grad = gradient

    def replay(self, half: _Half) -> None:
        """The forward or backward pass of a recording."""
        if self.store is None:
            half.graph.replay()
        else:
            self.store.replay(half.before, half.after, half.graph)

    def deposit(self, recording: _Recording, gradients: Sequence[Tensor | None]) -> None:
        """Replay the backward pass of the velocities' gradients and add what it finds to `parameter.grad`."""
        for static, gradient in zip(recording.gradients, gradients):
            if static is not None:
                static.zero_() if gradient is None else static.copy_(gradient)
        self.keep_gradients()
        self.replay(recording.backward)
        held = [p for p in recording.found if p.grad is not None]
        if held:
            torch._foreach_add_([p.grad for p in held], [recording.found[p] for p in held])
        for parameter, gradient in recording.found.items():
            if parameter.grad is None:
                parameter.grad = gradient


def _told(error: BaseException) -> str:
    """What an error says, and what the first one says, which it came after."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    last = str(error).partition("\n")[0]
    return last if first is error else f"{last}, after: {str(first).partition(chr(10))[0]}"


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether tensors of a pass equal those of another, which wait on the host; compared one by one on the device."""
    if len(found) != len(wanted):
        return False
    sums = torch.zeros(2, device=found[0].device)
    for tensor, other in zip(found, wanted):
        other = other.to(tensor.device).float()
        sums += torch.stack([(tensor.float() - other).square().sum(), other.square().sum()])
    off, size = sums.tolist()
    return off <= _TOLERANCE**2 * size


class _Replay(torch.autograd.Function):
    """A recorded pass as one node of the graph."""

    @staticmethod
    def forward(ctx, anchor: Tensor, graphs: TrainingGraphs, recording: _Recording, token: _Pass, *tensors: Tensor):
        _copy_all(recording.inputs, tensors)
        graphs.keep_gradients()  # while the GPU copies
        graphs.replay(recording.forward)
        ctx.graphs, ctx.recording, ctx.token = graphs, recording, token
        ctx.set_materialize_grads(False)
        return tuple(velocity.clone() for velocity in recording.velocities if velocity is not None)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        waiting = iter(gradients)
        aligned = [None if velocity is None else next(waiting) for velocity in ctx.recording.velocities]
        ctx.graphs.deposit(ctx.recording, aligned)
        ctx.token = None
        return (None,) * (4 + len(ctx.recording.inputs))


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors onto others of their shapes, with few kernels.

    One kernel copies many tensors, but only where all have the same dtypes and each lies as its copy does: a single one
    that differs has a call copy them one by one.
    """
    alike: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources):
        key = (target.dtype, source.dtype, target.stride() == source.stride())
        for group, tensor in zip(alike.setdefault(key, ([], [])), (target, source)):
            group.append(tensor)
    for group in alike.values():
        torch._foreach_copy_(*group)


def _beside_each_other(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A tensor for the gradient of each parameter."""
    first = parameters[0]
    return empty([parameter.shape for parameter in parameters], first.dtype, first.device)


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
