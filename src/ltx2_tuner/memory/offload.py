"""Keeping the hidden states of recomputed blocks in host memory between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ltx2_tuner.memory.host_memory import HostMemory
from ltx2_tuner.memory.streaming import lockable

_ALIKE = 8  # memory up to so many times as large serves a tensor: another bucket's, but not the other stream's


@dataclass(eq=False)
class _Parked:
    """A tensor in host memory.

    Attributes:
        copies: the stream it is copied on; None on a CPU.
        recorded: whether that is part of a recording.
        before: the same of the block before, which will be asked for after it.
        asked: whether it has been asked for.
        ahead: the tensor on its way back, and when it is there.
    """

    host: Tensor
    device: torch.device
    copies: torch.cuda.Stream | None
    recorded: bool
    before: weakref.ref[_Parked] | None = None
    asked: bool = False
    ahead: tuple[Tensor, torch.cuda.Event] | None = None

    def __del__(self) -> None:
        if self.ahead is not None and not self.recorded:  # nobody has waited for the copy, which may be under way
            self.ahead[0].record_stream(self.copies)


class ActivationOffload:
    """Makes the context in which hidden states are saved (`enable_gradient_checkpointing(saved_inputs=...)`).

    Copies run on a stream of their own into page-locked memory, beside what is computed within the context; at its
    end the compute waits for them, and the device's memory is free. What is asked for in the backward pass lies on its
    device again, and the block before it is on its way by then.

    The host's memory is used again, pass after pass. A pass that is being recorded as a CUDA graph, which comes after
    an unrecorded one of the same shape, takes memory that stays with the recordings: they name addresses. All of them
    share it, because one runs at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: dict[tuple[torch.cuda.Stream, torch.Size], weakref.ref[_Parked]] = {}
        self._free: list[HostMemory] = []
        self._recorded: list[HostMemory] = []
        self._waiting: list[HostMemory] = []  # of these, what the recording under way has not used

    def forget_recordings(self) -> None:
        """There are none any more: what they had is anybody's."""
        self._free += self._recorded
        self._recorded.clear()
        self._waiting = []

    @contextmanager
    def recording(self, main: torch.cuda.Stream) -> Iterator[None]:
        """Within the block half a pass is recorded on `main`."""
        self._copies.wait_stream(main)
        try:
            yield
        finally:  # a recording ends properly only with all streams back
            main.wait_stream(self._copies)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        leaving: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor: self._park(tensor, leaving), self._fetch):
            yield
        if leaving and self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        leaving.clear()  # what is saved keeps the hooks, and they the list

    def _park(self, tensor: Tensor, leaving: list[Tensor]) -> _Parked | Tensor:
        if tensor.numel() == 0:  # up to torch 2.11 a checkpoint saves one of its own
            return tensor.detach()
        records = self._copies is not None and torch.cuda.is_current_stream_capturing()
        size = tensor.nbytes
        memory = self._for_recording(size) if records else self._for_now(size)
        host = memory.bytes[:size].view(tensor.dtype).view(tensor.shape)
        parked = _Parked(host, tensor.device, self._copies, records)
        weakref.finalize(parked, (self._waiting if records else self._free).append, memory).atexit = False
        leaving.append(tensor)
        if self._copies is None:
            parked.host.copy_(tensor.detach())
            return parked
        stream = torch.cuda.current_stream(self._device)
        self._copies.wait_stream(stream)
        with torch.cuda.stream(self._copies):
            parked.host.copy_(tensor.detach(), non_blocking=True)
        kind = (stream, tensor.shape)
        parked.before, self._last[kind] = self._last.get(kind), weakref.ref(parked)
        return parked

    def _fetch(self, parked: _Parked | Tensor) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        if self._copies is None:
            return parked.host.to(parked.device, copy=True)
        tensor, there = parked.ahead or self._send(parked)
        parked.ahead, parked.asked = None, True
        before = None if parked.before is None else parked.before()
        wanted = before is not None and not before.asked and before.ahead is None
        if wanted and before.recorded == parked.recorded:
            before.ahead = self._send(before)
        torch.cuda.current_stream(self._device).wait_event(there)
        return tensor

    def _send(self, parked: _Parked) -> tuple[Tensor, torch.cuda.Event]:
        """Queue the copy of what is parked into memory of the current stream, which has to wait for the event."""
        tensor = torch.empty_like(parked.host, device=parked.device)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            tensor.copy_(parked.host, non_blocking=True)
            there = torch.cuda.Event()
            there.record()
        return tensor, there

    def _for_now(self, size: int) -> HostMemory:
        self._waiting = list(self._recorded)
        alike = [memory for memory in self._free if _alike(memory, size)]
        memory = _smallest(alike, size)
        if memory is not None:
            self._free.remove(memory)
            return memory
        if alike:  # all of them too small: this pass's take their place
            self._free.remove(max(alike, key=_size))
        return self._new(size)

    def _for_recording(self, size: int) -> HostMemory:
        memory = _smallest([memory for memory in self._waiting if _alike(memory, size)], size)
        if memory is not None:
            self._waiting.remove(memory)
            return memory
        memory = _smallest([memory for memory in self._free if _alike(memory, size)], size)
        if memory is None or not memory.locked:
            raise RuntimeError("hidden states can only be kept in page-locked memory while a pass is recorded")
        self._free.remove(memory)
        self._recorded.append(memory)
        return memory

    def _new(self, size: int) -> HostMemory:
        memory = HostMemory(size)
        if lockable(self._device):
            memory.lock(self._device)  # copies are slower without
        return memory


def _size(memory: HostMemory) -> int:
    return memory.bytes.numel()


def _alike(memory: HostMemory, size: int) -> bool:
    return size / _ALIKE <= _size(memory) <= size * _ALIKE


def _smallest(memories: list[HostMemory], size: int) -> HostMemory | None:
    """The smallest that takes so many bytes."""
    return min((memory for memory in memories if _size(memory) >= size), key=_size, default=None)
