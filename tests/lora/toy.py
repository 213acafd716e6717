"""A transformer in name only: the linear layers of LTX-2's blocks at toy sizes, without the arithmetic."""

from __future__ import annotations

import torch
from torch import nn

VIDEO, AUDIO = 12, 8


class Attention(nn.Module):
    def __init__(self, query: int, context: int, inner: int, gates: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(query, inner), nn.Linear(context, inner), nn.Linear(context, inner)
        self.to_out = nn.Sequential(nn.Linear(inner, query), nn.Identity())
        if gates:
            self.to_gate_logits = nn.Linear(query, 2)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        proj = nn.Module()
        proj.proj = nn.Linear(width, 4 * width)
        self.net = nn.Sequential(proj, nn.Identity(), nn.Linear(4 * width, width))


class Block(nn.Module):
    def __init__(self, gates: bool) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(VIDEO, VIDEO, VIDEO, gates), Attention(VIDEO, VIDEO, VIDEO, gates)
        self.audio_attn1, self.audio_attn2 = (
            Attention(AUDIO, AUDIO, AUDIO, gates),
            Attention(AUDIO, AUDIO, AUDIO, gates),
        )
        self.audio_to_video_attn = Attention(VIDEO, AUDIO, AUDIO, gates)
        self.video_to_audio_attn = Attention(AUDIO, VIDEO, AUDIO, gates)
        self.ff, self.audio_ff = FeedForward(VIDEO), FeedForward(AUDIO)


class ToyTransformer(nn.Module):
    """`gates` True has the layers of 2.3, False those of 2.0."""

    def __init__(self, blocks: int = 2, gates: bool = True) -> None:
        super().__init__()
        self.patchify_proj = nn.Linear(4, VIDEO)
        self.transformer_blocks = nn.ModuleList(Block(gates) for _ in range(blocks))


def randomise(network: nn.Module, seed: int = 1) -> None:
    """Give every adapter non-zero matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
