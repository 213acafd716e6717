"""Host memory of the blocks that will be streamed, filled in the background while a checkpoint is loaded.

Loading a streamed block ends on the device, where it is quantised. From there its matrices go straight into the one
buffer that they are streamed out of later; copying and page-locking overlap with reading the next blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from ltx2_tuner.memory.host_memory import HostMemory
from ltx2_tuner.memory.streaming import bind, layout, lockable


class HostBlocks:
    """Takes the matrices of streamed blocks to the host, block by block as they are loaded.

    Args:
        streamed: indices of the blocks to take; others stay where they are.
        device: where blocks are loaded.
        pinned: page-lock the memory where that is possible; None does.
    """

    def __init__(self, streamed: Sequence[int], device: torch.device, pinned: bool | None = None) -> None:
        self.streamed, self.device = frozenset(streamed), device
        self._wants_pin = lockable(device) and pinned is not False
        self._filled: dict[int, HostMemory] = {}  # a block's matrices as `streaming.layout` places them
        self._moving: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="host blocks")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, index: int, block: nn.Module) -> None:
        """Begin to move a block's matrices when the block taken before has arrived. An `on_block` of the loader."""
        if index not in self.streamed:
            return
        self._wait()
        loaded = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
        self._moving = self._thread.submit(self._move, index, block, loaded)

    def hand_over(self) -> dict[int, HostMemory]:
        """Memory by block index, page-locked where it could be, when all has arrived: the caller's from now on."""
        self._wait()
        self._thread.shutdown()
        filled, self._filled = self._filled, {}
        return filled

    def _wait(self) -> None:
        if self._moving is not None:
            self._moving.result()

    def _move(self, index: int, block: nn.Module, loaded: torch.cuda.Event | None) -> None:
        pieces, total = layout(block)
        memory = HostMemory(total)
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if loaded is not None:
                self._stream.wait_event(loaded)
            for piece in pieces:
                piece.view(memory.bytes).copy_(piece.layer.storage()[piece.name])  # returns when the bytes are there
        bind(pieces, memory.bytes)
        self._filled[index] = memory
        # After a refusal the block store tries again, and says what it means.
        self._wants_pin = self._wants_pin and memory.lock(self.device) == 0
