"""From Gemma's hidden states to one feature row per token.

B batch, S tokens, D Gemma's hidden size, L hidden states (embedding output and one per layer).

Every hidden state is normalised by itself, the L values of a channel are laid side by side (channel * L + state)
and one linear layer per stream mixes the D * L numbers. Normalisation is done in float32 one state at a time, so that
only the flat result is ever held whole: 385 MB per 1024-token prompt in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ltx2_tuner.models.text.config import TextConfig

_EPS = 1e-6


def normalize_per_prompt(state: Tensor, mask: Tensor) -> Tensor:
    """8 * (x - mean) / (max - min), both over the valid tokens and all channels of a prompt (LTX-2.0).

    Args:
        state: (B, S, D) float32, anything (NaN included) on padding.
        mask: (B, S) bool, true on valid tokens.
    """
    valid = mask[..., None]
    count = mask.sum(1)[:, None, None] * state.shape[-1]
    mean = state.masked_fill(~valid, 0).sum((1, 2), keepdim=True) / (count + _EPS)
    low = state.masked_fill(~valid, torch.inf).amin((1, 2), keepdim=True)
    high = state.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
    return (8 * (state - mean) / (high - low + _EPS)).masked_fill(~valid, 0)


def normalize_per_token(state: Tensor, mask: Tensor) -> Tensor:
    """RMS norm over the channels of every token (LTX-2.3). Shapes as in `normalize_per_prompt`."""
    scale = torch.rsqrt(state.square().mean(-1, keepdim=True) + _EPS)
    return (state * scale).masked_fill(~mask[..., None], 0)


class TextProjection(nn.Module):
    """Normalise, flatten and project hidden states; parameter names are those below `text_embedding_projection.`."""

    def __init__(self, config: TextConfig, audio: bool) -> None:
        super().__init__()
        self.config = config
        self.audio = audio
        inputs = config.hidden * config.states
        if config.separate_projections:
            self.video_aggregate_embed = nn.Linear(inputs, config.video.width)
            if audio:
                self.audio_aggregate_embed = nn.Linear(inputs, config.audio.width)
        else:
            self.aggregate_embed = nn.Linear(inputs, config.video.width, bias=False)

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of both streams.

        Args:
            hidden_states: L tensors (B, S, D).
            mask: (B, S) bool.

        Returns:
            video (B, S, Dv) and audio (B, S, Da) in the dtype of the weights; rows of padding mean nothing.
        """
        flat = self._flatten(hidden_states, mask)
        if not self.config.separate_projections:
            video = self.aggregate_embed(flat)
            return video, video if self.audio else None
        video = self._project(self.video_aggregate_embed, flat)
        return video, self._project(self.audio_aggregate_embed, flat) if self.audio else None

    def _flatten(self, hidden_states: Sequence[Tensor], mask: Tensor) -> Tensor:
        normalize = normalize_per_token if self.config.separate_projections else normalize_per_prompt
        dtype = next(self.parameters()).dtype
        first = hidden_states[0]
        flat = torch.empty((*first.shape, len(hidden_states)), dtype=dtype, device=first.device)  # (B, S, D, L)
        for index, state in enumerate(hidden_states):
            flat[..., index] = normalize(state.float(), mask)
        return flat.flatten(2)

    def _project(self, linear: nn.Linear, flat: Tensor) -> Tensor:
        # The factor goes on the input, so that the bias stays as it is.
        return linear(flat * (linear.out_features / self.config.hidden) ** 0.5)
