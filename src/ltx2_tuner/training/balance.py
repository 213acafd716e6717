"""The automatic weight of the audio loss.

Its averages are float32 scalars on the device, so that no micro-batch waits for a host copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLOOR = 1e-12


@dataclass(frozen=True)
class BalanceOptions:
    """Settings of --audio_loss_balance_*. mode: `none`, `inv_freq` (how often audio occurs) or `ema_mag` (sizes)."""

    mode: str = "none"
    beta: float = 0.01
    eps: float = 0.05
    minimum: float = 0.05
    maximum: float = 4.0
    ema_init: float = 1.0
    target_ratio: float = 0.33
    ema_decay: float = 0.99


class AudioBalancer:
    """Turns the base weight of the audio loss into the balanced one, once per micro-batch.

    `mean_over_ranks` averages a scalar tensor over the processes (identity with one).
    """

    def __init__(
        self,
        options: BalanceOptions,
        device: torch.device | str = "cpu",
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ) -> None:
        self.options = options
        self._mean_over_ranks = mean_over_ranks
        presence = min(max(options.ema_init, 1e-6), 1.0)
        size = max(options.ema_init, 1e-6)
        self.presence = torch.tensor(presence, device=device)
        self.audio_size = torch.tensor(size, device=device)
        self.video_size = torch.tensor(size, device=device)

    def weight(
        self, base: float | torch.Tensor, video_loss: torch.Tensor, audio_loss: torch.Tensor | None
    ) -> float | torch.Tensor:
        """The audio weight of this micro-batch; losses are unweighted scalars, None without audio."""
        if self.options.mode == "inv_freq":
            return self._by_frequency(base, audio_loss)
        if self.options.mode == "ema_mag":
            return self._by_size(base, video_loss.detach(), None if audio_loss is None else audio_loss.detach())
        return base

    def _by_frequency(self, base: float | torch.Tensor, audio_loss: torch.Tensor | None) -> torch.Tensor:
        options = self.options
        seen = self._mean_over_ranks(torch.full_like(self.presence, float(audio_loss is not None)))
        self.presence = ((1 - options.beta) * self.presence + options.beta * seen).clamp(0, 1)
        return (base / self.presence.clamp(min=options.eps)).clamp(options.minimum, options.maximum)

    def _by_size(
        self, base: float | torch.Tensor, video_loss: torch.Tensor, audio_loss: torch.Tensor | None
    ) -> torch.Tensor:
        options = self.options
        self.video_size = self._average(self.video_size, self._mean_over_ranks(video_loss))
        # Ranks without audio take part in the reduction too, or the others would wait for them for ever.
        present = self._mean_over_ranks(torch.full_like(self.audio_size, float(audio_loss is not None)))
        summed = self._mean_over_ranks(torch.zeros_like(self.audio_size) if audio_loss is None else audio_loss)
        updated = self._average(self.audio_size, summed / present.clamp(min=_FLOOR))
        self.audio_size = torch.where(present > 0, updated, self.audio_size)
        ratio = options.target_ratio * self.video_size.clamp(min=_FLOOR) / self.audio_size.clamp(min=_FLOOR)
        return (base * ratio).clamp(options.minimum, options.maximum)

    def _average(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        decay = self.options.ema_decay
        # A non-finite loss belongs to a window that is dropped; it must not stay in the average.
        new = torch.where(torch.isfinite(new), new.clamp(min=_FLOOR), old)
        return (decay * old + (1 - decay) * new).clamp(min=_FLOOR)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Device scalars for the log."""
        if self.options.mode == "inv_freq":
            return {"loss/audio_presence_ema": self.presence}
        if self.options.mode == "ema_mag":
            return {"loss/audio_loss_ema": self.audio_size, "loss/video_loss_ema": self.video_size}
        return {}

    def state(self) -> dict[str, float]:
        return {
            "presence": self.presence.item(),
            "audio_size": self.audio_size.item(),
            "video_size": self.video_size.item(),
        }

    def load_state(self, state: dict[str, float]) -> None:
        self.presence.fill_(state["presence"])
        self.audio_size.fill_(state["audio_size"])
        self.video_size.fill_(state["video_size"])
