"""A stand-in for CUDA's page locks that notices what the real ones take amiss in silence."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import pytest
import torch

from ltx2_tuner.memory import host_blocks, streaming

OUT_OF_MEMORY, ALREADY, NOT_LOCKED = 2, 712, 713


class Driver:
    """Stands in for `torch.cuda.cudart()`.

    Attributes:
        locked: sizes of the locked ranges by address.
        mistakes: what must never happen, in words.
        refuses_after: locks that are granted; None grants all.
        status: of every attempt to unlock; NOT_LOCKED without need says that the memory is not locked.
        error: raised where the device is waited for.
    """

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.mistakes: list[str] = []
        self.refuses_after: int | None = None
        self.status = 0
        self.error: type[BaseException] | None = None
        self.granted = self.waits = self.freed = 0
        self._waited = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.refuses_after is not None and self.granted >= self.refuses_after:
            return OUT_OF_MEMORY
        if self.touches(address, size):
            self.mistakes.append("locked twice")
            return ALREADY
        self.locked[address] = size
        self.granted += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if not self._waited:
            self.mistakes.append("unlocked while copies may be under way")
        self._waited = False
        if self.status:
            return self.status
        if address not in self.locked:
            self.mistakes.append("unlocked without a lock")
            return NOT_LOCKED
        del self.locked[address]
        return 0

    def synchronize(self, device: object = None) -> None:
        self.waits += 1
        if self.error is not None:
            raise self.error("the device cannot be waited for")
        self._waited = True

    def touches(self, address: int, size: int) -> bool:
        return any(start < address + size and address < start + length for start, length in self.locked.items())


def installed(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver in place of CUDA's, for blocks that are streamed to the CPU."""
    driver = Driver()

    class Pages(mmap.mmap):
        def __del__(self) -> None:
            driver.freed += 1
            if driver.touches(ctypes.addressof(ctypes.c_char.from_buffer(self)), len(self)):
                driver.mistakes.append("freed while it was locked")

    monkeypatch.setattr(mmap, "mmap", Pages)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", driver.synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for module in (streaming, host_blocks):
        monkeypatch.setattr(module, "lockable", lambda device: True)
    return driver
