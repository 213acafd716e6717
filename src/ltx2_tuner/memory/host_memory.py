"""Host memory that CUDA copies out of: page-locked where that is possible, and never freed before its lock.

Memory that is freed while CUDA holds it for locked is trouble for whoever gets its addresses next: they cannot be
locked again, and every copy out of them is slow.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_NOT_LOCKED = 713  # CUDA's status where there is no lock to release
# By address what could not be unlocked yet, and the device. It is kept: without it the memory would be freed.
_waiting: dict[int, tuple[Tensor, torch.device]] = {}


class HostMemory:
    """Bytes on pages of their own (two buffers on one page cannot both be page-locked), huge ones where they are.

    The lock is released when this object goes. The memory stays for as long as the lock or any view needs it.

    Attributes:
        bytes: all of them, as a tensor.
    """

    def __init__(self, size: int) -> None:
        unlock_waiting()
        pages = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8, count=size)
        self._lock: weakref.finalize | None = None

    @property
    def locked(self) -> bool:
        """Whether CUDA has page-locked the memory."""
        return self._lock is not None and self._lock.alive

    def lock(self, device: torch.device) -> int:
        """Page-lock the memory in place (torch's own allocator would round its size up to a power of two).

        Returns:
            CUDA's status, 0 for success.
        """
        if self.locked:
            return 0
        # There before the lock is, so that no interruption leaves a lock behind. Its arguments keep the memory.
        lock = weakref.finalize(self, _unlock, self.bytes, device)
        lock.atexit = False  # the driver does it then, and waits for nothing
        with torch.cuda.device(device):
            status = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0))
        if status:
            lock.detach()
            _take_refusal(device)
        else:
            self._lock = lock
        return status

    def unlock(self) -> None:
        """Release the lock when nothing copies out of the memory any more."""
        if self._lock is not None:
            self._lock()


def unlock_waiting() -> None:
    """Release the locks that could not be released when their memory went."""
    for address in list(_waiting):
        # Taken out first: a collection of garbage, here or in another thread, may come by in the middle.
        entry = _waiting.pop(address, None)
        if entry is None:
            continue
        released = False
        try:
            released = _released(*entry)
        finally:
            if not released:
                _waiting[address] = entry


def _unlock(memory: Tensor, device: torch.device) -> None:
    _waiting[memory.data_ptr()] = memory, device
    unlock_waiting()


def _released(memory: Tensor, device: torch.device) -> bool:
    """Whether the lock is gone. Garbage is collected at any time: also where CUDA can do nothing about it."""
    try:
        if torch.cuda.is_current_stream_capturing():  # waiting for the device would spoil the recording
            return False
        torch.cuda.synchronize(device)  # copies out of the memory may be under way
        with torch.cuda.device(device):
            status = int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
    except RuntimeError as error:
        logger.debug("host memory stays page-locked: %s", error)
        return False
    if status:
        _take_refusal(device)
    if status not in (0, _NOT_LOCKED):
        logger.warning("%d bytes of host memory stay page-locked (CUDA status %d)", memory.numel(), status)
        return False
    return True


def _take_refusal(device: torch.device) -> None:
    """The next kernel is told of a refusal: let it be one that does nothing else."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
