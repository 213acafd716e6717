"""The largest batch, tried before the first epoch: no run dies of memory at step 700.

Where it does not fit, more blocks are recomputed, then more are streamed, until it does. A pass that fits but leaves no
room to record it can take several times as long, so a few plans that need less are tried before it is put up with.
Nothing that is trained or drawn later changes by it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ltx2_tuner.memory.graphs import WARM_UP, TrainingGraphs
from ltx2_tuner.memory.host_blocks import HostBlocks
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.planner import Plan
from ltx2_tuner.memory.prepare import prepare_model, rearrange
from ltx2_tuner.memory.sharding import BlockShards
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.training.acceleration import accelerate
from ltx2_tuner.training.footprint import moment_bytes
from ltx2_tuner.training.loop import Trainer

logger = logging.getLogger(__name__)

# How often a plan may be tightened for the sake of recording, and by how much each time: a try takes seconds.
_STEPS = 4
MORE_ROOM = 3 << 28  # bytes
_NO_ROOM = "it leaves no room for recorded passes, which are much faster"
PASSES = WARM_UP + 1  # what is recorded as a CUDA graph is recorded in the last of them, or refused
_GIB = 2**30


class Arrangement:
    """A model made ready for training within its memory, and how to make it need less.

    Args:
        network: attached, on its device and in its dtype.
        plan: None where nothing was planned; then nothing can be tightened.
        dtype: what adapters multiply in.
        shards, hosts: as in `prepare_model`.
        stays: False where previews move the whole model to the host.
    """

    def __init__(
        self,
        model: LTXTransformer,
        network: nn.Module,
        options: MemoryOptions,
        compilation: CompileOptions,
        device: torch.device,
        dtype: torch.dtype,
        plan: Plan | None = None,
        shards: BlockShards | None = None,
        hosts: HostBlocks | None = None,
        stays: bool = True,
    ) -> None:
        self.model, self.network, self.device, self.dtype, self.plan = model, network, device, dtype, plan
        self.stays = stays
        self.tightened = 0
        self.prepared = prepare_model(model, options, compilation, device, shards, hosts)
        self._accelerate()

    def tighten(self, by: float = 0.0) -> bool:
        """Take the next plan that needs less memory, by so many bytes if there is such a one; False without any."""
        following = None if self.plan is None else self.plan.tighter(by)
        if following is None:
            return False
        self.plan = following
        self.tightened += 1
        if self.graphs is not None:
            self.graphs.remove()
        self.prepared = rearrange(self.model, self.prepared, following.options, self.device)
        self._accelerate()
        return True

    def _accelerate(self) -> None:
        on_cuda = self.device.type == "cuda"
        self.graphs = None
        if on_cuda:
            self.graphs = accelerate(self.model, self.network, self.prepared, self.dtype, stays=self.stays)

    @property
    def crowded(self) -> bool:
        """Whether another plan shall be tried for the sake of recording."""
        return self.tightened < _STEPS and crowded(self.graphs, self.plan)

    def release(self) -> None:
        """Give back what recorded passes hold: previews need the memory, and may move the weights."""
        if self.graphs is not None:
            self.graphs.release()


def crowded(graphs: TrainingGraphs | None, plan: Plan | None) -> bool:
    """Whether a pass has run that there was no room to record, though another plan may leave some."""
    refused = graphs is not None and bool(graphs.refused)
    return refused and plan is not None and plan.tighter() is not None


def rehearse(trainer: Trainer, batch: dict, arrangement: Arrangement, optimizer: str) -> None:
    """Run a batch forward and backward; tighten the arrangement until it fits.

    The peak of what fitted stays on record: torch does not see what a recorded pass takes when it is replayed.

    Args:
        optimizer: its name, which tells what its state will take.

    Raises:
        torch.OutOfMemoryError: nothing is left to tighten.
    """
    while True:
        failure = _attempt(trainer, batch, arrangement, optimizer)
        if failure is None:
            return
        logger.warning("the largest batch does not fit (%s)", failure.splitlines()[0])
        _forget(trainer)
        if trainer.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.run.device)
        if not _tightened(arrangement, MORE_ROOM if failure == _NO_ROOM else 0.0):
            raise torch.OutOfMemoryError(failure)
        logger.warning("%s", arrangement.plan.table)


def _tightened(arrangement: Arrangement, by: float) -> bool:
    """Take the next plan that the memory is large enough to arrange at all; False when there is none."""
    while True:
        try:
            return arrangement.tighten(by)
        except torch.OutOfMemoryError as error:
            logger.warning("the next plan cannot be arranged (%s)", str(error).splitlines()[0])


def _attempt(trainer: Trainer, batch: dict, arrangement: Arrangement, optimizer: str) -> str | None:
    """None, or what the device said. The error itself would keep everything alive that the pass had made."""
    device, accumulates = trainer.run.device, trainer.run.loop.accumulation > 1
    start, first = time.perf_counter(), None
    try:
        with _optimizer_state(trainer, optimizer):
            for _ in range(PASSES if arrangement.graphs is not None else 1 + accumulates):
                trainer.rehearse(batch)
                first = first or time.perf_counter() - start
                if not accumulates:  # else the gradients of a step's first pass are there during its second
                    trainer.run.optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError as error:
        return str(error)
    if arrangement.crowded:
        return _NO_ROOM
    if device.type == "cuda":
        planned = "" if arrangement.plan is None else f" (planned {arrangement.plan.predicted / _GIB:.1f})"
        logger.info(
            "rehearsed the largest batch: %.0f s, %.0f of them the first pass, peak %.1f GiB%s, %.1f GiB reserved",
            time.perf_counter() - start,
            first,
            torch.cuda.max_memory_allocated(device) / _GIB,
            planned,
            torch.cuda.max_memory_reserved(device) / _GIB,
        )
    _forget(trainer)
    return None


@contextmanager
def _optimizer_state(trainer: Trainer, optimizer: str) -> Iterator[None]:
    """Holds as much device memory as the optimizer will take at its first step, unless it has stepped already."""
    values = trainer.run.gradients.parameters
    size = sum(moment_bytes(optimizer, value.numel(), value.element_size()) for value in values)
    wanted = trainer.run.device.type == "cuda" and not trainer.run.optimizer.state
    placeholder = torch.empty(size, dtype=torch.uint8, device=trainer.run.device) if wanted else None
    yield
    del placeholder


def _forget(trainer: Trainer) -> None:
    """Free what a pass left behind."""
    trainer.run.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    device = trainer.run.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
