"""Reading tensors before they are asked for: several threads read while the loader copies and quantises."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ltx2_tuner.checkpoint.checkpoint import Checkpoint

THREADS = 8
AHEAD_BYTES = 256 << 20
PART_BYTES = 32 << 20  # that one thread reads at a time: the largest matrices take half of what is read ahead


class _Started(NamedTuple):
    """A tensor that is being read, or waits to be taken."""

    wanted: tuple[str, torch.device]
    tensor: Tensor
    parts: list[Future[None]]


class ReadAhead:
    """Reads tensors of a checkpoint in the order in which they will be asked for. Leaving its block ends the threads.

    Args:
        wanted: names and devices in that order. What is asked for out of turn is read at once, by the caller.
        limit: bytes of tensors that are there, or on their way, and not yet asked for; a single one may have more.
    """

    def __init__(
        self, checkpoint: Checkpoint, wanted: Sequence[tuple[str, torch.device]], limit: int = AHEAD_BYTES
    ) -> None:
        self.checkpoint, self.limit = checkpoint, limit
        self._wanted = deque(wanted)
        self._started: deque[_Started] = deque()
        self._bytes = 0
        self._threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="checkpoint")

    def __enter__(self) -> ReadAhead:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._wanted.clear()
        self._started.clear()

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """As `Checkpoint.read`.

        Raises:
            UserError: as `Checkpoint.read`, for the tensor that was asked for.
        """
        if not self._started or self._started[0].wanted != (name, device):
            return self.checkpoint.read(name, device, dtype)
        taken = self._started.popleft()
        self._bytes -= taken.tensor.nbytes
        self._start()
        for part in taken.parts:
            part.result()
        return taken.tensor if dtype is None else taken.tensor.to(dtype)

    def _start(self) -> None:
        while self._wanted:
            nbytes = self.checkpoint.entry(self._wanted[0][0]).nbytes
            if self._started and self._bytes + nbytes > self.limit:
                return
            wanted = self._wanted[0]
            tensor = self.checkpoint.reserve(*wanted)
            self._wanted.popleft()
            self._bytes += nbytes
            parts = [
                self._threads.submit(self.checkpoint.fill, wanted[0], tensor, start, min(start + PART_BYTES, nbytes))
                for start in range(0, nbytes, PART_BYTES)
            ]
            self._started.append(_Started(wanted, tensor, parts))
