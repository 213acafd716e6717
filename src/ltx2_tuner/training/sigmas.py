"""Noise levels for training: how sigma is drawn, and how the number of tokens moves the distribution."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

_UPPER_QUANTILE = 3.0902  # z of the 99.9th percentile
_LOWER_QUANTILE = 2.5758  # minus z of the 0.5th percentile
_REJECTION_ROUNDS = 1000


def token_shift(tokens: torch.Tensor | float) -> torch.Tensor | float:
    """Shift of the logit-normal for a number of tokens: 0.95 at 1024 and 2.05 at 4096, linear, never clamped."""
    return 0.95 + (tokens - 1024) * ((2.05 - 0.95) / (4096 - 1024))


@dataclass(frozen=True)
class SigmaSampler:
    """Draws noise levels in [0, 1].

    sampling: `shifted_logit_normal` or `uniform`. mode: `legacy` or `stretched`. shift: fixed shift instead of the one
    from the token count. minimum, maximum: range of sigma; values are rescaled into it, or redrawn until they fall
    into it with `preserve_shape`.
    """

    sampling: str = "shifted_logit_normal"
    mode: str = "stretched"
    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    shift: float | None = None
    minimum: float = 0.0
    maximum: float = 1.0
    preserve_shape: bool = False

    def sample(
        self, tokens: torch.Tensor, generator: torch.Generator, buckets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sigma (B,) float32 on the CPU for samples of `tokens` (B,) tokens.

        buckets: stratified values (B,) in [0, 1) that replace the main draw.
        """
        if not self.preserve_shape:
            sigma = self._draw(tokens, generator, buckets)
            return self.minimum + (self.maximum - self.minimum) * sigma
        return self._draw_inside(tokens, generator)

    def from_draws(
        self, normal: torch.Tensor, uniform: torch.Tensor, selector: torch.Tensor, shift: torch.Tensor | float
    ) -> torch.Tensor:
        """Sigma of the shifted logit-normal from its standard normal and its two uniforms, all (B,)."""
        shift = torch.as_tensor(shift, dtype=torch.float32)
        level = torch.sigmoid(self.std * normal + shift)
        if self.mode == "legacy":
            return level
        high = torch.sigmoid(shift + _UPPER_QUANTILE * self.std)
        low = torch.sigmoid(shift - _LOWER_QUANTILE * self.std)
        stretched = (level - low) / (high - low).clamp(min=1e-6)
        stretched = torch.where(stretched >= self.eps, stretched, 2 * self.eps - stretched).clamp(0, 1)
        replacement = (1 - self.eps) * uniform + self.eps
        return torch.where(selector > self.uniform_prob, stretched, replacement)

    def _draw(self, tokens: torch.Tensor, generator: torch.Generator, buckets: torch.Tensor | None) -> torch.Tensor:
        count = len(tokens)
        if self.sampling == "uniform":
            return torch.rand(count, generator=generator) if buckets is None else buckets.float()
        if buckets is None:
            normal = torch.randn(count, generator=generator)
        else:
            inner = buckets.float().clamp(1e-7, 1 - 1e-7)
            normal = math.sqrt(2) * torch.erfinv(2 * inner - 1)
        # Both uniforms are drawn whatever the probability is, so that changing it does not shift later draws.
        uniform = torch.rand(count, generator=generator)
        selector = torch.rand(count, generator=generator)
        shift = token_shift(tokens.float()) if self.shift is None else self.shift
        return self.from_draws(normal, uniform, selector, shift)

    def _draw_inside(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Redraw whole vectors and keep the values inside the range, in the order they were drawn."""
        found: list[float] = []
        sigma = torch.empty(0)
        for _ in range(_REJECTION_ROUNDS):
            sigma = self._draw(tokens, generator, None)
            found += sigma[(sigma >= self.minimum) & (sigma <= self.maximum)].tolist()
            if len(found) >= len(tokens):
                return torch.tensor(found[: len(tokens)])
        logger.warning(
            "no noise level fell into [%g, %g] in %d draws; clamping", self.minimum, self.maximum, _REJECTION_ROUNDS
        )
        found += sigma.clamp(self.minimum, self.maximum).tolist()
        return torch.tensor(found[: len(tokens)])


def describe(sampler: SigmaSampler, tokens: int, seed: int, count: int = 100_000) -> torch.Tensor:
    """`count` draws (count,) for a bucket of `tokens` tokens, for --show_timesteps."""
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(torch.full((count,), tokens), generator)


def histogram_text(sigmas: torch.Tensor, lines: int = 40, width: int = 80) -> str:
    """A histogram of sigma * 1000 in `lines` rows of equal width (25 values each for 40 lines)."""
    counts = torch.histc(sigmas.clamp(0, 1) * 1000, bins=lines, min=0, max=1000)
    step = 1000 // lines
    most = max(counts.max().item(), 1)
    rows = []
    for index, count in enumerate(counts.tolist()):
        bar = "#" * round(width * count / most)
        rows.append(f"{index * step:4d}-{(index + 1) * step - 1:4d} {int(count):7d} {bar}")
    return "\n".join(rows)


def histogram_picture(sigmas: torch.Tensor, width: int = 800, height: int = 400, bins: int = 100) -> torch.Tensor:
    """The same histogram as an image (height, width, 3) uint8."""
    counts = torch.histc(sigmas.clamp(0, 1), bins=bins, min=0, max=1)
    heights = (counts / counts.max().clamp(min=1) * (height - 20)).round().long()
    columns = heights.repeat_interleave(width // bins)
    rows = torch.arange(height).flip(0)[:, None]
    filled = rows < columns[None, :]
    picture = torch.full((height, len(columns), 3), 255, dtype=torch.uint8)
    picture[filled] = torch.tensor([40, 90, 160], dtype=torch.uint8)
    return picture
