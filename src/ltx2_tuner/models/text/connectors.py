"""The text side of a checkpoint as one module: projection of Gemma's hidden states, then a connector per stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.text.config import TextConfig
from ltx2_tuner.models.text.connector import EmbeddingsConnector
from ltx2_tuner.models.text.features import TextProjection


@dataclass(frozen=True)
class TextContext:
    """What the transformer attends to.

    video (B, S, Dv); audio (B, S, Da) or None; mask (B, S) int64, all ones because registers fill the padding.
    """

    video: Tensor
    audio: Tensor | None
    mask: Tensor


class TextConnectors(nn.Module):
    """Gemma's hidden states -> text context. Parameter names are the checkpoint's without `model.diffusion_model.`."""

    def __init__(self, config: TextConfig, audio: bool = True) -> None:
        super().__init__()
        self.config = config
        self.text_embedding_projection = TextProjection(config, audio)
        self.video_embeddings_connector = EmbeddingsConnector(config.video)
        self.audio_embeddings_connector = EmbeddingsConnector(config.audio) if audio else None

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor, tokens: int | None = None) -> TextContext:
        """Encode a batch of prompts.

        Args:
            hidden_states: one (B, S, D) tensor per hidden state of Gemma.
            mask: (B, S), 0 on padding (either side).
            tokens: length of the context when it is longer than S (hidden states computed without common padding).
        """
        mask = mask.bool()
        video, audio = self.text_embedding_projection(hidden_states, mask)
        missing = (tokens or mask.shape[1]) - mask.shape[1]
        if missing:
            mask = F.pad(mask, (0, missing))
            video = F.pad(video, (0, 0, 0, missing))
            audio = None if audio is None else F.pad(audio, (0, 0, 0, missing))
        return TextContext(
            video=self.video_embeddings_connector(video, mask),
            audio=None if self.audio_embeddings_connector is None else self.audio_embeddings_connector(audio, mask),
            mask=torch.ones_like(mask, dtype=torch.int64),
        )
