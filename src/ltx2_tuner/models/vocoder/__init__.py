"""From mel spectrogram to waveform."""

from ltx2_tuner.models.vocoder.base import Vocoder
from ltx2_tuner.models.vocoder.config import infer_section

__all__ = ["Vocoder", "infer_section"]
