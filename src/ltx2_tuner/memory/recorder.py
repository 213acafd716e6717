"""Making CUDA graphs of a training pass: its forward and its backward half, captured, checked, and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ltx2_tuner.memory.offload import ActivationOffload
from ltx2_tuner.memory.streaming import BlockStore, RingState
from ltx2_tuner.memory.two_streams import TwoStreams
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.model import run_block
from ltx2_tuner.side_by_side import empty

Streams = tuple[Modality | None, Modality | None]
Velocities = tuple[Tensor | None, Tensor | None]
_TOLERANCE = 1e-2  # between a recorded and an unrecorded pass, relative; attention gradients vary from run to run


class Copies(Protocol):
    """What passes read in place of the trained parameters (lora.working_copies.WorkingCopies)."""

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        """A context in which passes read fresh leaves, which it lists."""

    def of_masters(self, gradients: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that have a gradient, given those of the leaves."""


@dataclass
class Half:
    """The forward or the backward pass, and the ring's states before and after it."""

    graph: torch.cuda.CUDAGraph
    before: RingState | None
    after: RingState | None = None


@dataclass
class Recording:
    """A recorded pass, and the tensors it reads and writes."""

    inputs: list[Tensor]
    velocities: Velocities = (None, None)
    gradients: Velocities = (None, None)  # of the velocities
    found: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # gradients that the pass leaves
    forward: Half | None = None
    backward: Half | None = None
    offload: ActivationOffload | None = None  # whose host memory it names


class Recorder:
    """Records the passes of a model, whose weights stay at their addresses but for those that a BlockStore brings.

    Args:
        parameters: what is trained.
        copies: what passes read in place of the parameters (a leaf that was used on one stream cannot be recorded on
            another).
        streams: 2 puts the sound stream's kernels beside the picture's.

    Attributes:
        runner: the model's own block runner.
        store: the same, if blocks are streamed.
        grads: the gradients of the pass replayed last, in one flat tensor for all recordings.
        held: bytes that recordings have reserved.
    """

    def __init__(self, model: LTXTransformer, parameters: Sequence[nn.Parameter], copies: Copies, streams: int) -> None:
        self.model, self.parameters, self.copies, self.streams = model, list(parameters), copies, streams
        self.eager = model.forward
        self.runner = model.block_runner
        self.store = self.runner if isinstance(self.runner, BlockStore) else None
        self.main = torch.cuda.Stream(priority=-1)  # the picture's kernels go first: the sound's wait for gaps
        self.two_streams = TwoStreams()
        self.forget()
        # The leaves of a recording belong to no other pass, whose stream could differ (torch 2.10 and later warn).
        getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda enabled: None)(False)

    def forget(self) -> None:
        """Begin anew: memory of recordings, which nobody must hold any more, goes with the next `give_back`."""
        if self.offload is not None:
            self.offload.forget_recordings()
        self.grads: dict[nn.Parameter, Tensor] = {}
        self.held = 0
        self.pool = torch.cuda.graph_pool_handle()

    @property
    def offload(self) -> ActivationOffload | None:
        """What keeps hidden states on the host, if something does."""
        saved = self.model.transformer_blocks[0].saved_inputs
        return saved if isinstance(saved, ActivationOffload) else None

    def record(self, streams: Streams) -> Recording:
        """A recording that gives what the same pass gives unrecorded.

        Raises:
            RuntimeError: the pass cannot be recorded, or gives something else. The error keeps alive all that was made.
        """
        try:
            expected = self._unrecorded(streams)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with self.copies.recorded() as leaves:
                recording = self._recorded(streams, leaves)
            self.held += torch.cuda.memory_reserved() - before
            self._check(recording, expected)
            return recording
        except RuntimeError:
            _leave_capture(self.pool)
            raise
        finally:
            self._clean_up()

    def replay(self, half: Half) -> None:
        """The forward or backward pass of a recording."""
        if self.store is None:
            half.graph.replay()
        else:
            self.store.replay(half.before, half.after, half.graph)

    def keep_gradients(self) -> None:
        """Copy gradients of an earlier pass of this step out of the memory that is about to be overwritten."""
        held = [parameter for parameter, gradient in self.grads.items() if parameter.grad is gradient]
        if held:
            copies = _beside_each_other(held)
            copy_all(copies, [parameter.grad for parameter in held])
            for parameter, gradient in zip(held, copies):
                parameter.grad = gradient

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

    def _check(self, recording: Recording, expected: Sequence[Tensor]) -> None:
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

    def _recorded(self, streams: Streams, leaves: list[Tensor]) -> Recording:
        copies = tuple(None if modality is None else _copied(modality) for modality in streams)
        recording = Recording(tensors_of(copies), offload=self.offload)
        if self.streams == 2 and self.store is not None:
            self.store.run = self.two_streams
        elif self.streams == 2:
            self.model.block_runner = self.two_streams
        with self._half() as recording.forward:
            velocities = self.eager(*copies)
        present = [velocity for velocity in velocities if velocity is not None]
        recording.velocities = tuple(None if velocity is None else velocity.detach() for velocity in velocities)
        gradients = [torch.zeros_like(velocity) for velocity in present]
        waiting = iter(gradients)
        recording.gradients = tuple(None if velocity is None else next(waiting) for velocity in velocities)
        with self._half() as recording.backward:
            found = torch.autograd.grad(present, leaves, gradients, allow_unused=True)
            pairs = self.copies.of_masters(found)
            # Made when the activations are gone, in their memory.
            self.grads = self.grads or dict(zip(self.parameters, _beside_each_other(self.parameters)))
            recording.found = {parameter: self.grads[parameter] for parameter, _ in pairs}
            copy_all(list(recording.found.values()), [gradient for _, gradient in pairs])
        return recording

    @contextlib.contextmanager
    def _half(self) -> Iterator[Half]:
        """Captures what runs within."""
        main, sides = self.main, [self.two_streams.side] if self.streams == 2 else []
        half = Half(torch.cuda.CUDAGraph(), self._ring())
        # Other threads (data loading) may allocate pinned memory meanwhile, hence thread_local.
        capture = torch.cuda.graph(half.graph, pool=self.pool, stream=main, capture_error_mode="thread_local")
        with torch.cuda.stream(main), capture:  # a capture that fails to end leaves its stream the current one
            for side in sides:
                side.wait_stream(main)
            store = None if half.before is None else self.store.recording(half.before, main, *sides)
            offload = None if self.offload is None else self.offload.recording(main)
            try:
                with offload or contextlib.nullcontext(), store or contextlib.nullcontext():
                    yield half
            finally:  # also when something failed: a recording ends properly only with all streams back
                for side in sides:
                    main.wait_stream(side)
        half.after = self._ring()

    def _ring(self) -> RingState | None:
        return None if self.store is None else self.store.state()


def _leave_capture(pool: tuple[int, int]) -> None:
    """Have torch forget a capture that could not be ended properly, which it takes to be still under way.

    Its allocator would keep what several streams have used, and the pool; its default generator would refuse to draw.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError):  # it was ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)  # as `torch.cuda.use_mem_pool` ends
    with contextlib.suppress(RuntimeError, IndexError, AttributeError):
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
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


def tensors_of(streams: Streams) -> list[Tensor]:
    """Every tensor of both records, in a fixed order."""
    values = (getattr(modality, spec.name) for modality in streams if modality is not None for spec in fields(modality))
    return [value for value in values if isinstance(value, Tensor)]


def _copied(modality: Modality) -> Modality:
    values = {spec.name: getattr(modality, spec.name) for spec in fields(modality)}
    copies = {name: value.detach().clone() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(modality, **copies)


def _beside_each_other(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A tensor for the gradient of each parameter."""
    first = parameters[0]
    return empty([parameter.shape for parameter in parameters], first.dtype, first.device)


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
