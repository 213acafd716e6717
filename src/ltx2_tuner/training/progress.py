"""Where a run is: counters, the running loss average, the progress line, and the signals that end it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm


@dataclass
class Progress:
    """step: optimizer steps done. micro_batches: drawn since the start, dropped windows included. epoch: counted from
    1. step_in_epoch: micro-batches of that epoch done, 0 at epoch ends."""

    step: int = 0
    micro_batches: int = 0
    epoch: int = 1
    step_in_epoch: int = 0

    def state(self) -> dict[str, int]:
        return {
            "global_step": self.step,
            "micro_batches": self.micro_batches,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
        }

    def load_state(self, state: dict) -> None:
        self.step, self.micro_batches = state["global_step"], state["micro_batches"]
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]


@dataclass
class LossAverage:
    """Mean over one epoch's length: a slot per micro-batch, whose old value is replaced."""

    slots: dict[int, float] = field(default_factory=dict)

    def add(self, slot: int, loss: float) -> None:
        self.slots[slot] = loss

    @property
    def value(self) -> float:
        return sum(self.slots.values()) / max(len(self.slots), 1)

    def state(self) -> dict[str, object]:
        return {"loss_avg": self.value, "loss_count": len(self.slots), "loss_slots": sorted(self.slots.items())}

    def load_state(self, state: dict) -> None:
        self.slots = {int(slot): float(loss) for slot, loss in state["loss_slots"]}


class StepLine:
    """The progress bar: loss, seconds per step, peak device memory, time left."""

    def __init__(self, total: int, start: int, device: torch.device, *, shown: bool) -> None:
        self._bar = tqdm(total=total, initial=start, desc="steps", disable=not shown, smoothing=0.1)
        self._device = device
        self._last = time.perf_counter()

    def advance(self, metrics: dict[str, float], *, balanced: bool) -> dict[str, float]:
        """Show one optimizer step; returns its `perf/` numbers."""
        now = time.perf_counter()
        perf = {"perf/step_seconds": now - self._last}
        self._last = now
        fields = {"avr_loss": f"{metrics['loss/average']:.4f}"}
        for name, key in (("loss_v", "loss/video"), ("loss_a", "loss/audio")):
            fields[name] = f"{metrics[key]:.4f}" if key in metrics else "n/a"
        if balanced and "loss/audio_weight_effective" in metrics:
            fields["audio_w"] = f"{metrics['loss/audio_weight_effective']:.3f}"
        if "loss/audio_presence_ema" in metrics:
            fields["audio_p"] = f"{metrics['loss/audio_presence_ema']:.2f}"
        fields["s/step"] = f"{perf['perf/step_seconds']:.2f}"
        if self._device.type == "cuda":
            perf["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            fields["peak"] = f"{perf['perf/peak_memory_gib']:.1f}GiB"
        self._bar.set_postfix(fields, refresh=False)
        self._bar.update(1)
        return perf

    def pause(self) -> None:
        """Time spent outside of steps (saving, sampling) is not a step's time."""
        self._last = time.perf_counter()

    def close(self) -> None:
        self._bar.close()


_SAME_REQUEST = 1.0  # seconds in which a launcher passes on a Ctrl-C that the terminal has sent already


@contextlib.contextmanager
def stop_requests(*, told: bool = True) -> Iterator[StopFlag]:
    """Within the block, the first Ctrl-C or SIGTERM only raises the flag; the second stops at once.

    Args:
        told: say so on standard error.
    """
    flag = StopFlag()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {}
    first = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if not flag.raised:
            flag.raised, first = True, now
            say("stopping after this step; Ctrl-C again leaves at once")
        elif now - first > _SAME_REQUEST:
            say("leaving at once; steps since the last save are lost")
            raise KeyboardInterrupt

    def say(text: str) -> None:
        if told:  # written past the buffers, which the signal may have met in use
            os.write(sys.__stderr__.fileno(), f"\n{text}\n".encode())

    try:
        for number in signals:
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals stay as they are
        pass
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class StopFlag:
    """Whether the user asked to stop."""

    raised: bool = False


def progress_record(progress: Progress, metrics: dict[str, float], learning_rate: float) -> dict[str, float]:
    """The numbers of a checkpoint's sidecar; what is unknown is absent."""
    names = {"loss": "loss/current", "loss_avg": "loss/average", "loss_video": "loss/video", "loss_audio": "loss/audio"}
    record = {name: metrics[key] for name, key in names.items() if key in metrics}
    return {**record, "lr": learning_rate}
