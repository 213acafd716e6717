"""Sound to latents and back in one call."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor

from ltx2_tuner.models.audio_vae.mel import LogMel
from ltx2_tuner.models.audio_vae.model import AudioDecoder, AudioEncoder
from ltx2_tuner.models.vocoder import Vocoder

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_waveform(encoder: AudioEncoder, waveform: Tensor, rate: int, log_mel: LogMel | None = None) -> Tensor:
    """Waveform (B, channels, S) in [-1, 1] at `rate` samples/s -> latents (B, C, T, M) on the encoder's device.

    The spectrogram is float32, the latents have the dtype of the encoder's weights. Where half precision overflows
    the encoder is run once more in float32, and the result rounded.

    Args:
        log_mel: the front end, if the caller keeps one for many clips.

    Raises:
        ValueError: no samples.
    """
    weight = encoder.conv_in.conv.weight
    log_mel = (log_mel or LogMel(encoder.config)).to(weight.device)
    mel = log_mel(waveform.to(weight.device), rate)
    latents = encoder(mel)
    if latents.isfinite().all() or weight.dtype == torch.float32:
        return latents
    logger.warning("sound latents overflow %s: encoding this item in float32", weight.dtype)
    return copy.deepcopy(encoder).float()(mel).to(weight.dtype)


@torch.no_grad()
def decode_waveform(decoder: AudioDecoder, vocoder: Vocoder, latents: Tensor) -> Tensor:
    """Latents (B, C, T, M) -> waveform (B, 2, S) float32 in [-1, 1] at `vocoder.output_rate` samples/s."""
    return vocoder(decoder(latents.float())).float()
