"""The 2.3 vocoder: a generator at 16 kHz, and a second one that adds what lies above, up to 48 kHz.

Legend: B batch, L samples, R ratio of the two rates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx2_tuner.models.audio_vae.mel import FLOOR, mel_filters
from ltx2_tuner.models.vocoder.base import Vocoder
from ltx2_tuner.models.vocoder.config import ExtensionConfig
from ltx2_tuner.models.vocoder.generator import Generator

ROLLOFF = 0.99
SINC_WIDTH = 6  # zero crossings on each side


def hann_upsample(x: Tensor, ratio: int) -> Tensor:
    """(B, C, L) -> (B, C, L * ratio) by a Hann-windowed sinc, the ends repeated."""
    width = math.ceil(SINC_WIDTH / ROLLOFF)
    times = (torch.arange(2 * width * ratio + 1, device=x.device, dtype=x.dtype) / ratio - width) * ROLLOFF
    window = torch.cos(math.pi * times.clamp(-SINC_WIDTH, SINC_WIDTH) / (2 * SINC_WIDTH)).square()
    taps = torch.sinc(times) * window * ROLLOFF / ratio
    padded = F.pad(x, (width, width), mode="replicate").flatten(0, 1).unsqueeze(1)  # (B*C, 1, L + 2*width)
    y = ratio * F.conv_transpose1d(padded, taps.view(1, 1, -1), stride=ratio)
    start = 2 * width * ratio
    return y[..., start : start + x.shape[-1] * ratio].unflatten(0, x.shape[:2]).squeeze(2)


class FourierBasis(nn.Module):
    """Windowed cosines, then sines, as convolution kernels (fft_length + 2, 1, fft_length).

    The inverse is part of the file and otherwise unused.
    """

    def __init__(self, fft_length: int) -> None:
        super().__init__()
        bins, steps = torch.arange(fft_length // 2 + 1)[:, None], torch.arange(fft_length)
        angles = 2 * math.pi * ((bins * steps) % fft_length) / fft_length
        basis = torch.cat([angles.cos(), -angles.sin()]) * torch.hann_window(fft_length)
        self.register_buffer("forward_basis", basis[:, None])
        self.register_buffer("inverse_basis", torch.zeros_like(basis[:, None]))


class CausalLogMel(nn.Module):
    """Log-mel of (B, 2, L) -> (B, 2, bins, L / hop), each frame made of samples up to its own end.

    Its bases are the checkpoint's, rounded as they are: the generator was trained on them.
    """

    def __init__(self, config: ExtensionConfig) -> None:
        super().__init__()
        self.hop_length = config.hop_length
        self.stft_fn = FourierBasis(config.fft_length)
        rate = config.base.output_rate
        filters = mel_filters(config.extension.mel_bins, config.fft_length, rate, 0.0, rate / 2)
        self.register_buffer("mel_basis", filters)

    def forward(self, waveform: Tensor) -> Tensor:
        basis = self.stft_fn.forward_basis
        samples = F.pad(waveform.flatten(0, 1).unsqueeze(1), (basis.shape[-1] - self.hop_length, 0))
        real, imaginary = F.conv1d(samples, basis, stride=self.hop_length).chunk(2, dim=1)
        magnitude = (real.square() + imaginary.square()).sqrt()  # (B*2, bins of the transform, L / hop)
        return (self.mel_basis @ magnitude).clamp_min(FLOOR).log().unflatten(0, waveform.shape[:2])


class ExtendedVocoder(Vocoder):
    """Log-mel (B, 2, frames, bins) -> waveform (B, 2, S) at the extended rate."""

    def __init__(self, config: ExtensionConfig) -> None:
        super().__init__()
        self.config = config
        self.output_rate = config.extension.output_rate
        self.vocoder = Generator(config.base)
        self.bwe_generator = Generator(config.extension)
        self.mel_stft = CausalLogMel(config)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 2, frames, bins) -> (B, 2, frames * samples_per_frame * R) in the dtype of the weights."""
        low = self.vocoder(mel)
        ratio = self.config.ratio
        length = low.shape[-1] * ratio
        with torch.autocast(low.device.type, enabled=False):
            low = F.pad(low, (0, -low.shape[-1] % self.config.hop_length))
            spectrum = self.mel_stft(low).transpose(2, 3)  # (B, 2, frames, bins)
            extended = self.bwe_generator(spectrum) + hann_upsample(low, ratio)
        return extended.clamp(-1, 1)[..., :length]
