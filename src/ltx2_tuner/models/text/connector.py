"""A connector: transformer blocks over text features, with learned registers in the place of padding.

B batch, S tokens, C width = H heads * head width, R registers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.text.config import ConnectorConfig

_EPS = 1e-6
_THETA = 10000.0


def fill_with_registers(features: Tensor, mask: Tensor, registers: Tensor) -> Tensor:
    """Move the valid rows of every prompt to the front and fill the rest with registers.

    Args:
        features: (B, S, C), padded on either side.
        mask: (B, S) bool, true on valid tokens.
        registers: (R, C); the row at position p is register p mod R. S is a multiple of R.
    """
    tokens = features.shape[1]
    if tokens % registers.shape[0]:
        raise ValueError(f"{tokens} text tokens are no multiple of the {registers.shape[0]} registers")
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    compact = features.gather(1, order[..., None].expand_as(features))
    filling = registers.to(features).repeat(tokens // registers.shape[0], 1)
    front = torch.arange(tokens, device=mask.device) < mask.sum(1, keepdim=True)
    return torch.where(front[..., None], compact, filling)


def rotary_table(config: ConnectorConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines, (2, H, S, head width / 2).

    One frequency ladder runs over the whole width and is then cut into heads. The angles reach thousands of radians,
    so the order of roundings (ladder in float64, then float32) is part of what was trained.
    """
    half = config.width // 2
    precision = torch.float64 if config.double_precision else torch.float32
    exponents = torch.linspace(0, 1, half, dtype=precision)
    ladder = (torch.tensor(_THETA, dtype=precision) ** exponents * (math.pi / 2)).float()
    fraction = torch.arange(tokens, dtype=torch.float32) / config.max_position
    angles = (fraction[:, None] * 2 - 1) * ladder  # (S, C/2)
    table = torch.stack((angles.cos(), angles.sin()))
    table = table.unflatten(-1, (config.heads, config.head_dim // 2)).transpose(1, 2)
    return table.to(device=device, dtype=dtype)


def rotate(x: Tensor, table: Tensor, rope_type: str) -> Tensor:
    """Rotate (B, H, S, head width): halves against each other (`split`) or even against odd (`interleaved`)."""
    cos, sin = table
    if rope_type == "split":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


class _Attention(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.rope_type = config.rope_type
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=_EPS) for _ in range(2))
        if config.gated:
            self.to_gate_logits = nn.Linear(width, config.heads)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        def split(value: Tensor) -> Tensor:  # (B, S, C) -> (B, H, S, head width)
            return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = rotate(split(self.q_norm(self.to_q(x))), table, self.rope_type)
        key = rotate(split(self.k_norm(self.to_k(x))), table, self.rope_type)
        out = F.scaled_dot_product_attention(query, key, split(self.to_v(x)))
        if hasattr(self, "to_gate_logits"):
            out = out * (2 * self.to_gate_logits(x).sigmoid()).transpose(1, 2)[..., None]
        return self.to_out(out.transpose(1, 2).flatten(2))


class _Projection(nn.Module):
    """The first half of a feed-forward layer, so that its weights are named `net.0.proj`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Projection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.attn1 = _Attention(config)
        self.ff = _FeedForward(config.width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attn1(_rms(x), table)
        return x + self.ff(_rms(x))


class EmbeddingsConnector(nn.Module):
    """Text features (B, S, C) -> text context (B, S, C); every returned position is valid."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.learnable_registers = nn.Parameter(torch.empty(config.registers, config.width))
        self.transformer_1d_blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        x = fill_with_registers(features, mask, self.learnable_registers)
        table = rotary_table(self.config, x.shape[1], x.device, x.dtype)
        for block in self.transformer_1d_blocks:
            x = block(x, table)
        return _rms(x)


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)
