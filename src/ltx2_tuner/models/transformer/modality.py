"""Everything the transformer needs of one stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Modality:
    """One stream, video or audio. B batch, T tokens, C latent channels, S text tokens, D text channels.

    Attributes:
        latent: (B, T, C) noisy tokens.
        sigma: (B,) noise level of the sample, in [0, 1]; never lowered because some tokens are clean.
        timesteps: (B, 1) or (B, T) noise level per token, 0 for clean conditioning tokens; or the (B, K) distinct
            levels that `timestep_index` points into, which saves embedding the same level T times.
        positions: (B or 1, axes, T, 2) float32 start and end of each token: seconds (, pixels, pixels).
        context: (B, S, D) text embedding after the connectors.
        context_mask: None, integer 0/1 (B, S) or (B, T, S), or a ready additive floating mask.
        attention_mask: None or self-attention strengths in [0, 1], (B, T or 1, T).
        enabled: False leaves the stream as it is embedded; the other stream still attends to it.
        timestep_index: None or (B, T) integers below K.
        cross_mask: None or (B, T), true where the other stream may attend to the token. A sample without any such
            token adds nothing to the other stream.
        text_keep: None or (B, T), 0 where the text attention adds nothing to a token.
        keyframe_marker: None or (B, T), true on first-frame and keyframe tokens (LTX-2.5 only).
    """

    latent: Tensor
    sigma: Tensor
    timesteps: Tensor
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    enabled: bool = True
    timestep_index: Tensor | None = None
    cross_mask: Tensor | None = None
    text_keep: Tensor | None = None
    keyframe_marker: Tensor | None = None
