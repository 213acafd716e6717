"""What a run says about itself when its numbers look like one of the known troubles; each note comes once."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger(__name__)

FIRST_STEPS = 20  # optimizer steps that the first notes are made from
UNUSUAL_LOSS = 1.5  # a model that fits its caches starts below 1; one that knows nothing at about 2
RISES = 3  # validations in a row
FULL, ROOMY = 0.97, 0.8  # shares of the device memory


class RunNotes:
    """Follows a run from its first step here; `swapped` blocks are streamed from the host."""

    def __init__(self, device: torch.device, swapped: int = 0) -> None:
        self._device, self._swapped = device, swapped
        self._steps = 0
        self._seconds: list[float] = []
        self._sums = {"loss/video": [0.0, 0], "loss/audio": [0.0, 0]}
        self._validation: tuple[float, float] | None = None  # the last one's val_loss and average training loss
        self._rises = 0

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of optimizer step `number`; after the first ones say how fast and how well it goes."""
        self._steps += 1
        if self._steps > FIRST_STEPS:
            return
        self._seconds.append(metrics["perf/step_seconds"])
        for name, sums in self._sums.items():
            if name in metrics:
                sums[0] += metrics[name]
                sums[1] += 1
        if self._steps < FIRST_STEPS:
            return
        self._say_pace()
        if number == FIRST_STEPS:  # a resumed run is past its start
            self._judge_losses()

    def validation(self, found: Mapping[str, float], average: float) -> dict[str, float]:
        """`val_loss/gap`, the validation loss less the average training loss; a note once the two part for long."""
        if "val_loss" not in found:
            return {}
        now = found["val_loss"], average
        if self._validation is not None:
            self._rises = self._rises + 1 if now[0] > self._validation[0] and now[1] < self._validation[1] else 0
        self._validation = now
        if self._rises == RISES:
            logger.warning(
                "val_loss rose %d times in a row, to %.4g, while the training loss fell to %.4g: the run overfits; the "
                "best checkpoint is an earlier one, and more data, a lower --network_dim or --learning_rate help",
                RISES,
                *now,
            )
        return {"val_loss/gap": now[0] - now[1]}

    def _say_pace(self) -> None:
        pace = sorted(self._seconds)[FIRST_STEPS // 2]
        if self._device.type != "cuda":
            logger.info("the first %d steps: %.3g s/step", FIRST_STEPS, pace)
            return
        total = torch.cuda.mem_get_info(self._device)[1]
        used = torch.cuda.max_memory_reserved(self._device)
        logger.info(
            "the first %d steps: %.3g s/step, at most %.1f of %.1f GiB", FIRST_STEPS, pace, used / 2**30, total / 2**30
        )
        note = memory_note(used, total, self._swapped)
        if note:
            logger.warning("%s", note)

    def _judge_losses(self) -> None:
        for name, (total, count) in self._sums.items():
            if count and total / count > UNUSUAL_LOSS:
                logger.warning(
                    "%s is %.3g over the first %d steps, where a model that fits its data is below 1: look at "
                    "--ltx_version, at caches of another checkpoint and at the frame rate of the clips",
                    name,
                    total / count,
                    FIRST_STEPS,
                )


def memory_note(used: int, total: int, swapped: int) -> str | None:
    """What to change about the device memory, None for nothing.

    Args:
        used, total: bytes, at the peak and there are.
        swapped: blocks that are streamed from the host.
    """
    if used > FULL * total:
        return (
            f"device memory is full ({100 * used / total:.0f} %): a driver that pages it to the host then makes steps "
            f"many times slower; use --blocks_to_swap {swapped + 4} or a lower --vram_budget"
        )
    if swapped and used < ROOMY * total:
        return (
            f"{100 - 100 * used / total:.0f} % of the device memory stay free: a --blocks_to_swap below {swapped} is "
            "faster"
        )
    return None
