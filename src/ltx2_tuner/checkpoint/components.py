"""Loading the autoencoders, the vocoder and the text side of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.keys import DIT
from ltx2_tuner.checkpoint.modules import CONFIG_ERRORS, check_present, fill, on_meta
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltx2_tuner.models.text import TextConfig, TextConnectors
from ltx2_tuner.models.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from ltx2_tuner.models.vocoder import Vocoder

Device = str | torch.device
Module = TypeVar("Module", bound=nn.Module)


def load_video_encoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> VideoEncoder:
    """The frozen video encoder; UserError names what the file lacks."""
    return _load(
        checkpoint,
        "video_encoder",
        lambda: VideoEncoder(VideoVAEConfig.from_dict(_section(checkpoint, "vae"))),
        device,
        dtype,
    )


def load_video_decoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> VideoDecoder:
    """The frozen video decoder."""

    def build() -> VideoDecoder:
        config = VideoVAEConfig.from_dict(_section(checkpoint, "vae"))
        return VideoDecoder(config.matched_to(checkpoint.names("vae.decoder.")))

    return _load(checkpoint, "video_decoder", build, device, dtype)


def load_audio_encoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> AudioEncoder:
    """The frozen sound encoder."""
    return _load(
        checkpoint,
        "audio_encoder",
        lambda: AudioEncoder(AudioVAEConfig.from_dict(_section(checkpoint, "audio_vae"))),
        device,
        dtype,
    )


def load_audio_decoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> AudioDecoder:
    """The frozen sound decoder."""
    return _load(
        checkpoint,
        "audio_decoder",
        lambda: AudioDecoder(AudioVAEConfig.from_dict(_section(checkpoint, "audio_vae"))),
        device,
        dtype,
    )


def load_vocoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype = torch.float32) -> Vocoder:
    """The frozen vocoder; float32 unless there is a reason (half precision is audible)."""
    return _load(checkpoint, "vocoder", lambda: Vocoder.from_config(_section(checkpoint, "vocoder")), device, dtype)


def load_text_connectors(
    checkpoint: Checkpoint, device: Device, dtype: torch.dtype, mode: str = "av"
) -> TextConnectors:
    """The frozen text projection and connectors; mode "video" leaves the audio connector out."""

    def build() -> TextConnectors:
        shapes = {name.removeprefix(DIT): checkpoint.entry(name).shape for name in checkpoint.names()}
        config = TextConfig.from_dict(checkpoint.config.get("transformer", {}), shapes)
        return TextConnectors(config, audio=mode != "video")

    return _load(checkpoint, "text", build, device, dtype)


def _load(
    checkpoint: Checkpoint, component: str, build: Callable[[], Module], device: Device, dtype: torch.dtype
) -> Module:
    check_present(checkpoint, component)
    try:
        with on_meta():
            module = build()
    except CONFIG_ERRORS as error:
        raise UserError(
            f"{checkpoint.path}: its {component.replace('_', ' ')} is none this program knows ({error}); "
            "give an LTX-2 or LTX-2.3 file"
        ) from error
    return fill(checkpoint, component, module, device, dtype)


def _section(checkpoint: Checkpoint, name: str) -> dict:
    return checkpoint.config.get(name, {})
