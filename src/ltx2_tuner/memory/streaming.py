"""Block streaming: the matrices of some transformer blocks live in host memory and visit the device when needed.

The frozen layers of a streamed block lie in ONE contiguous byte buffer, so that a block moves with one copy whatever
its precision. The device holds a small ring of buffers of that size. While block k computes, the next streamed block
(the previous one in the backward pass) is copied on a stream of its own; events order the two streams, so no buffer is
overwritten while something still reads it. Weights never travel back, and autograd never sees them: a frozen layer
keeps no reference to its weight for the backward pass, it asks the layer again. Everything small (norms, tables,
gates) and the adapters stay on the device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltx2_tuner.memory.host_memory import HostMemory
from ltx2_tuner.models.transformer.model import BlockRunner, run_block
from ltx2_tuner.quantization.frozen import FrozenLinear

if TYPE_CHECKING:
    from ltx2_tuner.memory.host_blocks import HostBlocks

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; what the widest vector loads and fp8 products ask for


def streamed_indices(blocks: int, count: int) -> tuple[int, ...]:
    """Which `count` of `blocks` blocks are streamed: evenly spread, so that each copy has compute to hide behind."""
    return tuple((2 * index + 1) * blocks // (2 * count) for index in range(count))


def further_indices(blocks: int, streamed: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of `blocks` blocks, those that are streamed already among them, the others where few are near.

    None of them comes back to the device, which may have no room for it.
    """
    if count < len(streamed) or not streamed:
        return streamed_indices(blocks, count)
    chosen = set(streamed)
    while len(chosen) < count:
        others = (index for index in range(blocks) if index not in chosen)
        chosen.add(min(others, key=lambda index: sum((index - other) ** -2 for other in chosen)))
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class _Piece:
    """Where one tensor of a frozen layer lies in its block's buffer."""

    layer: FrozenLinear
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.size].view(self.dtype).view(self.shape)


@dataclass(eq=False)
class _Slot:
    """A device buffer, the block in it, and the event after which its content is there.

    staging: page-locked host memory that copies go through where the blocks' own memory cannot be page-locked.
    """

    buffer: Tensor
    holds: int | None = None
    ready: torch.cuda.Event | None = None
    staging: Tensor | None = None


@dataclass(frozen=True)
class RingState:
    """Which block lies in which slot, the slot used longest ago first, and where the last pass stood."""

    slots: tuple[tuple[_Slot, int | None], ...]
    direction: int
    last: int


class BlockStore:
    """Streams blocks; install it as the model's `block_runner`.

    Attributes:
        run: what runs a block that is there.

    Args:
        blocks: all blocks of the model, adapters attached.
        streamed: indices of those that live in host memory.
        device: where blocks compute. On the CPU the same copies happen without streams.
        ring: device buffers; 1 means that copies and compute do not overlap.
        pinned: page-locked host memory; None tries it and goes on without where it fails.
        hosts: what took streamed blocks to the host while they were loaded.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Sequence[int],
        device: torch.device,
        *,
        ring: int = 2,
        pinned: bool | None = None,
        hosts: HostBlocks | None = None,
    ) -> None:
        self.device = device
        self.streamed = tuple(sorted(streamed))
        self._wants_pin = lockable(device) and pinned is not False
        self._pieces: dict[int, list[_Piece]] = {}
        self._host: dict[int, HostMemory] = {}
        layouts = {index: layout(blocks[index]) for index in self.streamed}
        size = max(total for _, total in layouts.values())
        # The ring is reserved first: near-full memory shows at the start, not at some later step.
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(ring)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._filled = {} if hosts is None else hosts.hand_over()
        for index, (pieces, total) in layouts.items():
            self._take(index, blocks[index], pieces, total)
        self._direction = 1
        self._last = -1
        self.run: BlockRunner = run_block
        self._readers: tuple[torch.cuda.Stream, ...] = ()  # streams that compute, while a pass is recorded

    @property
    def recordable(self) -> bool:
        """Whether passes may be recorded as CUDA graphs: copies out of memory that is not page-locked cannot be."""
        return self._copies is not None and all(
            index in self._host and self._host[index].locked for index in self.streamed
        )

    @contextlib.contextmanager
    def recording(self, state: RingState, *readers: torch.cuda.Stream) -> Iterator[None]:
        """Within the block a pass is recorded that will find the ring in `state`; `readers` compute.

        Nothing is copied meanwhile, so `state` afterwards tells what the pass, replayed, leaves behind.
        """
        self._assume(state)
        self._readers = readers
        self._copies.wait_stream(readers[0])
        try:
            yield
        finally:
            self._readers = ()
            for slot in self._slots:
                slot.ready = None  # recorded events mean nothing outside
            readers[0].wait_stream(self._copies)  # fails where the recording did

    def state(self) -> RingState:
        """Of the ring as it is now."""
        return RingState(tuple((slot, slot.holds) for slot in self._slots), self._direction, self._last)

    def replay(self, before: RingState, after: RingState, graph: torch.cuda.CUDAGraph) -> None:
        """Replay a recorded pass, with the blocks in the ring that it expects at its start."""
        for slot, index in before.slots:
            if index is not None and slot.holds != index:
                self._fetch_into(slot, index)
        torch.cuda.current_stream(self.device).wait_stream(self._copies)
        graph.replay()
        self._assume(after)

    def empty_ring(self) -> None:
        """Take it that no slot holds a block, as after a recording, which copies nothing."""
        torch.cuda.synchronize(self.device)
        self._assume(RingState(tuple((slot, None) for slot in self._slots), 1, -1))

    def _assume(self, state: RingState) -> None:
        self._slots = [slot for slot, _ in state.slots]
        for slot, index in state.slots:
            slot.holds, slot.ready = index, None
        self._direction, self._last = state.direction, state.last

    def restream(self, blocks: Sequence[nn.Module], streamed: Sequence[int], ring: int) -> None:
        """Stream other blocks from now on, between two passes, through at most as many device buffers as now.

        Where the device's memory is too small for it, the store streams what it has come to, and may be told again.
        """
        if self._copies is not None:
            torch.cuda.synchronize(self.device)
        del self._slots[ring:]
        for slot in self._slots:
            slot.holds = None
        for index in self._pieces:
            self._bind(index, self._slots[0])
        try:
            for index in streamed:
                if index not in self._pieces:
                    self._take(index, blocks[index], *layout(blocks[index]))
            for index in set(self._pieces) - set(streamed):
                self._bring_home(index)
        finally:
            self.streamed = tuple(sorted(self._pieces))

    def __str__(self) -> str:
        return f"{len(self.streamed)} blocks streamed ({self.host_bytes / 2**30:.1f} GiB on the host)"

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that hold streamed blocks."""
        return sum(memory.bytes.numel() for memory in self._host.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of the ring."""
        return sum(slot.buffer.numel() for slot in self._slots)

    recomputes = True  # a block that recomputes itself in the backward pass finds its weights there

    def __call__(
        self, block: nn.Module, index: int, *arguments: object, recompute: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run a block: bring it in, and see to it that it is there again when its backward pass begins."""
        self.acquire(index, 1 if index > self._last else self._direction)
        outputs = self.run(block, index, *arguments, recompute=recompute)
        for output in outputs:
            if output is not None and output.requires_grad:
                output.register_hook(lambda _, index=index: self.acquire(index, -1))
        return outputs

    def acquire(self, index: int, direction: int) -> None:
        """Have a block on the device, and copy as many of the next streamed ones as slots are free (`direction` ±1)."""
        self._direction, self._last = direction, index
        free = len(self._slots)
        needed = {index}
        if index in self._pieces:
            free -= 1
            slot = self._slot_with(index) or self._fetch(index, set())
            if slot.ready is not None:
                for stream in self._computing():
                    stream.wait_event(slot.ready)
            self._bind(index, slot)
            # Most recently used comes last.
            self._slots.remove(slot)
            self._slots.append(slot)
        ahead = sorted((other for other in self.streamed if (other - index) * direction > 0), key=direction.__mul__)
        for following in ahead[:free]:
            needed.add(following)
            if self._slot_with(following) is None:
                self._fetch(following, needed)

    def _slot_with(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == index), None)

    def _fetch(self, index: int, needed: set[int]) -> _Slot:
        """Copy a block into the slot that was used longest ago and holds none of the `needed` blocks."""
        slot = next(slot for slot in self._slots if slot.holds not in needed)
        self._fetch_into(slot, index)
        return slot

    def _fetch_into(self, slot: _Slot, index: int) -> None:
        slot.holds = index
        if self._copies is None:
            self._copy_in(index, slot)
            return
        # All kernels that read the slot's old content are queued on the compute streams by now.
        for stream in self._computing():
            self._copies.wait_stream(stream)
        with torch.cuda.stream(self._copies):
            self._copy_in(index, slot)
            slot.ready = torch.cuda.Event()
            slot.ready.record()

    def _computing(self) -> tuple[torch.cuda.Stream, ...]:
        return self._readers or (torch.cuda.current_stream(self.device),)

    def _copy_in(self, index: int, slot: _Slot) -> None:
        """Queue the copy of a block's bytes into a slot, on the current stream."""
        source = self._host[index].bytes
        if slot.staging is not None:
            if slot.ready is not None:
                slot.ready.synchronize()  # the last copy out of it
            source = slot.staging[: source.numel()].copy_(source)
        slot.buffer[: source.numel()].copy_(source, non_blocking=True)

    def _bind(self, index: int, slot: _Slot) -> None:
        bind(self._pieces[index], slot.buffer)

    def _take(self, index: int, block: nn.Module, pieces: list[_Piece], total: int) -> None:
        """Take a block's matrices out of it, and move everything else of it to the device."""
        self._keep(index, pieces, total)
        self._pieces[index] = pieces
        # Bound to a slot from now on, whatever it holds: moving the model finds every layer on the device already.
        self._bind(index, self._slots[0])
        block.to(self.device)

    def _keep(self, index: int, pieces: list[_Piece], total: int) -> None:
        """Have a block's matrices in one host buffer."""
        memory = self._filled.pop(index, None)
        if memory is None:
            memory = HostMemory(total)
            for piece in pieces:
                piece.view(memory.bytes).copy_(piece.layer.storage()[piece.name])
        self._host[index] = memory
        self._lock(memory)

    def _bring_home(self, index: int) -> None:
        """Give a block matrices of its own on the device."""
        home = self._host[index].bytes.to(self.device, copy=True)  # the block stays streamed where there is no room
        bind(self._pieces.pop(index), home)
        del self._host[index]  # and its lock with it

    def _lock(self, memory: HostMemory) -> None:
        """Page-lock a block's buffer; after a refusal copies go through small locked buffers."""
        if not self._wants_pin:
            return
        status = memory.lock(self.device)
        if status == 0:
            return
        self._wants_pin = False
        try:
            for slot in self._slots:
                slot.staging = torch.empty(slot.buffer.numel(), dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            for slot in self._slots:
                slot.staging = None
        logger.warning(
            "host memory for streamed blocks cannot be page-locked here (CUDA status %d): streaming will be slower; "
            "close other programs, or add --no-use_pinned_memory_for_block_swap to skip this",
            status,
        )

    def close(self) -> None:
        """Release page locks; the store cannot be used afterwards."""
        for memory in (*self._host.values(), *self._filled.values()):
            memory.unlock()
        self._host.clear()


def lockable(device: torch.device) -> bool:
    """Whether page-locked memory makes copies to a device faster."""
    return device.type == "cuda"


def bind(pieces: Sequence[_Piece], buffer: Tensor) -> None:
    """Have the layers of a block use their tensors in `buffer`."""
    tensors: dict[FrozenLinear, dict[str, Tensor]] = {}
    for piece in pieces:
        tensors.setdefault(piece.layer, {})[piece.name] = piece.view(buffer)
    for layer, found in tensors.items():
        layer.rebind(found)


def layout(block: nn.Module) -> tuple[list[_Piece], int]:
    """The tensors of a block's frozen layers, and the bytes of the buffer that takes them."""
    pieces: list[_Piece] = []
    offset = 0
    for layer in block.modules():
        if not isinstance(layer, FrozenLinear):
            continue
        for name, tensor in layer.storage().items():
            size = tensor.nbytes
            pieces.append(_Piece(layer, name, tensor.dtype, tuple(tensor.shape), offset, size))
            offset += -(-size // ALIGNMENT) * ALIGNMENT
    return pieces, offset
