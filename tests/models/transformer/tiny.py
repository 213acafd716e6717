"""Small random transformers and inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ltx2_tuner.models.transformer import LTXTransformer, Modality, TransformerConfig
from ltx2_tuner.models.transformer.tokens import audio_positions, video_positions

GRID = (2, 2, 3)  # latent frames, rows, columns
AUDIO_TOKENS = 5
TEXT_TOKENS = 6

_SIZES = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "audio_attention_head_dim": 8,
    "in_channels": 8,
    "out_channels": 8,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "cross_attention_dim": 32,
    "audio_cross_attention_dim": 16,
    "caption_channels": 12,
}
_SECTIONS = {
    "2.0": {},
    "2.3": {
        "cross_attention_adaln": True,
        "apply_gated_attention": True,
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
        "caption_proj_input_norm": False,
    },
}
_SECTIONS["2.5"] = _SECTIONS["2.3"] | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}


def config(version: str = "2.3", **changes: object) -> TransformerConfig:
    return TransformerConfig.from_dict(_SIZES | _SECTIONS[version] | changes)


def model(version: str = "2.3", variant: str = "av", *, seed: int = 0, **changes: object) -> LTXTransformer:
    """Random frozen weights, of a size that keeps every part of a block alive in the result."""
    built = LTXTransformer(config(version, **changes), variant)
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return built.requires_grad_(False).eval()


def inputs(
    settings: TransformerConfig, *, batch: int = 2, seed: int = 1, per_token: bool = True
) -> dict[str, Modality]:
    """Random `video` and `audio`; with `per_token` the first tokens of each stream are clean."""
    generator = torch.Generator().manual_seed(seed)
    streams = {
        "video": (settings.in_channels, video_positions(*GRID, 25.0, batch=batch)),
        "audio": (settings.audio_in_channels, audio_positions(AUDIO_TOKENS, batch=batch)),
    }
    result = {}
    for stream, (channels, positions) in streams.items():
        tokens = positions.shape[2]
        sigma = torch.rand(batch, generator=generator)
        timesteps = sigma[:, None]
        if per_token:
            timesteps = timesteps.repeat(1, tokens)
            timesteps[:, :2] = 0
        width = settings.context_width(stream)
        result[stream] = Modality(
            latent=torch.randn(batch, tokens, channels, generator=generator),
            sigma=sigma,
            timesteps=timesteps,
            positions=positions,
            context=torch.randn(batch, TEXT_TOKENS, width, generator=generator),
        )
    return result


def to(modality: Modality, device: str) -> Modality:
    """The modality with all its tensors on `device`."""
    return _map(modality, lambda tensor: tensor.to(device))


def one_sample(modality: Modality, sample: int) -> Modality:
    """The batch of one that holds `sample` alone."""
    return _map(modality, lambda tensor: tensor[sample : sample + 1])


def _map(modality: Modality, change: Callable[[torch.Tensor], torch.Tensor]) -> Modality:
    values = {field.name: getattr(modality, field.name) for field in dataclasses.fields(modality)}
    changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(modality, **changed)
