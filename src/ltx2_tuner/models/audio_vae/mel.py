"""From waveforms to the log-mel spectrograms the sound autoencoder was trained on. Always float32."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.models.audio_vae.config import AudioVAEConfig

logger = logging.getLogger(__name__)

FLOOR = 1e-5

# The Slaney mel scale: linear below 1000 Hz, logarithmic above.
_LINEAR_HZ_PER_MEL = 200 / 3
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def mel_filters(bins: int, fft_length: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Triangular Slaney filters of unit area (bins, fft_length // 2 + 1), float32, for magnitudes between Hz bounds."""

    def to_mel(hz: float) -> float:
        if hz < _LOG_START_HZ:
            return hz / _LINEAR_HZ_PER_MEL
        return _LOG_START_MEL + math.log(hz / _LOG_START_HZ) / _LOG_STEP

    mels = torch.linspace(to_mel(low), to_mel(high), bins + 2, dtype=torch.float64)
    logarithmic = _LOG_START_HZ * torch.exp((mels - _LOG_START_MEL) * _LOG_STEP)
    edges = torch.where(mels < _LOG_START_MEL, mels * _LINEAR_HZ_PER_MEL, logarithmic)  # (bins + 2,) Hz
    frequencies = torch.linspace(0, sample_rate / 2, fft_length // 2 + 1, dtype=torch.float64)
    left, center, right = (edges[offset : offset + bins, None] for offset in range(3))
    rising = (frequencies - left) / (center - left)
    falling = (right - frequencies) / (right - center)
    return (torch.minimum(rising, falling).clamp_min(0) * 2 / (right - left)).float()


def to_stereo(waveform: Tensor) -> Tensor:
    """(B, channels, S) -> (B, 2, S): one channel twice, two as they are, the mean of more twice."""
    if waveform.shape[1] == 2:
        return waveform
    return waveform.mean(dim=1, keepdim=True).expand(-1, 2, -1)


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """(..., S) at `rate` -> (..., ceil(S * new_rate / rate)) by torchaudio's windowed sinc, float32."""
    if rate == new_rate:
        return waveform
    prepare_torchaudio()
    from torchaudio.functional import resample as windowed_sinc

    return windowed_sinc(waveform.float(), rate, new_rate)


class LogMel(nn.Module):
    """Waveforms (B, channels, S) in [-1, 1] at any rate -> natural-log mel magnitudes (B, 2, frames, bins).

    frames = 1 + samples at the model's rate // hop. Silence is log(1e-5) everywhere.
    """

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        filters = mel_filters(config.mel_bins, config.fft_length, config.sample_rate, config.mel_min, config.mel_max)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(config.fft_length), persistent=False)

    def forward(self, waveform: Tensor, rate: int) -> Tensor:
        """(B, channels, S) at `rate` samples/s -> (B, 2, frames, bins) float32; ValueError when S is 0.

        Sound too short to be reflected at its ends is padded with silence, with a warning.
        """
        if waveform.shape[-1] == 0:
            raise ValueError("the waveform has no samples")
        samples = to_stereo(resample(waveform.float(), rate, self.config.sample_rate))
        shortest = self.config.fft_length // 2 + 1
        if samples.shape[-1] < shortest:
            logger.warning("%d samples of sound are too short: padded with silence", samples.shape[-1])
            samples = F.pad(samples, (0, self.config.fft_length - samples.shape[-1]))
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.stft(
                samples.flatten(0, 1),
                self.config.fft_length,
                self.config.hop_length,
                window=self.window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            ).abs()  # (B*2, bins of the transform, frames)
            mel = (self.filters @ spectrum).clamp_min(FLOOR).log()
        return mel.transpose(1, 2).unflatten(0, (-1, 2)).contiguous()
