"""One accumulation window: gradients of all processes, their norms, and one copy of everything that is logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import distributed, nn

from ltx2_tuner.devices import Arriving, send
from ltx2_tuner.side_by_side import flat_of, views
from ltx2_tuner.training.losses import StreamLoss
from ltx2_tuner.training.objective import LossTerms, band_losses


@dataclass
class MicroBatch:
    """What stays of a micro-batch until its window is counted. The loss tensors are detached device scalars."""

    items: list[str]
    slot: int  # place in the epoch
    has_audio: bool  # of its own, not silence
    total: torch.Tensor
    terms: LossTerms
    video_sigma: list[float]
    audio_sigma: list[float]


@dataclass(frozen=True)
class WindowValues:
    """Host numbers of a finished window."""

    finite: bool
    losses: list[tuple[int, float]]  # (slot, total loss) of each micro-batch
    metrics: dict[str, float]
    stop: bool


@dataclass
class Gradients:
    """The trainable parameters, as the window's end needs them. `names` decide which norm counts as audio."""

    parameters: list[nn.Parameter]
    names: list[str]
    max_norm: float
    audio_indices: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.audio_indices = [index for index, name in enumerate(self.names) if "audio_" in name]

    def gather(self, bad: torch.Tensor, stop: torch.Tensor) -> None:
        """Average the gradients over all processes in one reduction; tell all whether one of them raised a flag (1,).

        Parameters without a gradient here count as zero: another rank's batch may have reached them.
        """
        if not several_processes():
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self.parameters]
        flat = flat_of(grads, torch.float32)  # as recorded passes leave them
        apart = flat is None
        if apart:
            flat = torch.cat([grad.flatten() for grad in grads]).float()
        flags = torch.cat([bad, stop]).float()
        distributed.all_reduce(flat)
        distributed.all_reduce(flags)
        bad.copy_(flags[:1] > 0)
        stop.copy_(flags[1:] > 0)
        flat /= distributed.get_world_size()
        if apart:
            torch._foreach_copy_(grads, views(flat, [grad.shape for grad in grads]))

    @property
    def present(self) -> bool:
        """Whether any parameter has a gradient; without one there is nothing to step on."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def norms(self) -> torch.Tensor:
        """(3,) float32 norms before clipping: all, audio, video."""
        grads = [parameter.grad for parameter in self.parameters]
        present = [index for index, grad in enumerate(grads) if grad is not None]
        if not present:
            return torch.zeros(3)
        norms = torch._foreach_norm([grads[index] for index in present])
        audio = set(self.audio_indices)
        of_audio = [norm for index, norm in zip(present, norms) if index in audio]  # a mask would wait for the device
        total = torch.stack(norms).float().square().sum()
        audio_square = torch.stack(of_audio).float().square().sum() if of_audio else total.new_zeros(())
        return torch.stack([total, audio_square, (total - audio_square).clamp(min=0)]).sqrt()

    def clip(self, norm: torch.Tensor) -> None:
        """Scale all gradients down so that their joint norm is at most `max_norm` (0 is off)."""
        if self.max_norm <= 0 or not self.present:
            return
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, factor)


class LossScaler(torch.amp.GradScaler):
    """torch's, which refuses gradients in fp16; those of --full_fp16 are meant to be."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


class Fetch:
    """Every number of a window on its way to the host, in one copy that begins at once.

    A stream's loss is its mean over the micro-batches that trained it, so that a window whose last batch has no sound
    still tells the sound's loss.

    Args:
        bad: (1,), whether a loss or a gradient is not finite.
        extra: more scalars to log, by name.
    """

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        norms: torch.Tensor,
        bad: torch.Tensor,
        stop: torch.Tensor,
        extra: Mapping[str, torch.Tensor | float],
    ) -> None:
        self._batches, self._extra = batches, list(extra)
        losses = [loss for batch in batches for loss in (batch.terms.video, batch.terms.audio) if loss is not None]
        flat = [*(batch.total for batch in batches), *norms, bad[0], stop[0]]
        flat += [batch.terms.audio_weight for batch in batches]
        flat += [value for loss in losses for value in (loss.mean, *loss.per_sample, *loss.active)]
        flat += extra.values()
        self._numbers = Arriving(torch.stack([_scalar(value, bad.device) for value in flat]))

    def values(self) -> WindowValues:
        """The numbers; waits for the device to have made them."""
        batches, numbers = self._batches, iter(self._numbers.wait().tolist())
        totals = [next(numbers) for _ in batches]
        total_norm, audio_norm, video_norm = next(numbers), next(numbers), next(numbers)
        is_bad, stopped = next(numbers) > 0, next(numbers) > 0
        audio_weights = [next(numbers) for _ in batches]
        video, audio = _StreamValues("video", "loss_v"), _StreamValues("audio", "loss_a")
        audio_weight = 0.0
        for batch, weight in zip(batches, audio_weights):
            video.add(batch.terms.video, batch.video_sigma, numbers)
            if audio.add(batch.terms.audio, batch.audio_sigma, numbers):
                audio_weight = weight
        metrics = {"loss/current": totals[-1], "grad_norm/total": total_norm}
        if audio_norm:
            metrics |= {"grad_norm/audio": audio_norm, "grad_norm/video": video_norm}
            if video_norm:
                metrics["grad_norm/audio_video_ratio"] = audio_norm / video_norm
        metrics |= {**video.metrics(), **audio.metrics()}
        if metrics.get("loss/video") and "loss/audio" in metrics:
            metrics["loss/audio_video_ratio"] = metrics["loss/audio"] / metrics["loss/video"]
            metrics["loss/audio_weight_effective"] = audio_weight
        metrics |= {name: next(numbers) for name in self._extra}
        losses = [(batch.slot, total) for batch, total in zip(batches, totals)]
        return WindowValues(not is_bad, losses, metrics, stopped)


@dataclass(frozen=True)
class ClosedWindow:
    """A window whose gradients are complete. stepped: the device has been told to step on them if they are finite."""

    batches: list[MicroBatch]
    fetch: Fetch
    stepped: bool

    @property
    def items(self) -> list[str]:
        return [item for batch in self.batches for item in batch.items]


def _scalar(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A float32 scalar on the device; nothing waits for it."""
    if isinstance(value, torch.Tensor):
        return send(value.detach(), device, torch.float32).reshape(())
    return torch.full((), float(value), device=device)


@dataclass
class _StreamValues:
    """Host numbers of one stream over a window: the mean of each micro-batch, and (sigma, loss) of each sample."""

    stream: str
    prefix: str
    means: list[float] = field(default_factory=list)
    samples: list[tuple[float, float]] = field(default_factory=list)

    def add(self, loss: StreamLoss | None, sigmas: Sequence[float], numbers: Iterator[float]) -> bool:
        """Take a micro-batch's numbers; false when it did not train the stream."""
        if loss is None:
            return False
        mean = next(numbers)
        per_sample = [next(numbers) for _ in loss.per_sample]
        active = [next(numbers) > 0 for _ in loss.active]
        if not any(active):
            return False
        self.means.append(mean)
        self.samples += [(sigma, value) for sigma, value, counts in zip(sigmas, per_sample, active) if counts]
        return True

    def metrics(self) -> dict[str, float]:
        if not self.means:
            return {}
        mean = sum(self.means) / len(self.means)
        return {f"loss/{self.stream}": mean, **band_losses(self.prefix, *zip(*self.samples))}


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Average of a scalar over the processes; the value itself with one."""
    if not several_processes():
        return value
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()


def several_processes() -> bool:
    """Whether gradients are averaged over processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
