"""The mel-spectrogram autoencoder for sound."""

from ltx2_tuner.models.audio_vae.config import AudioVAEConfig, infer_section
from ltx2_tuner.models.audio_vae.mel import LogMel
from ltx2_tuner.models.audio_vae.model import AudioDecoder, AudioEncoder
from ltx2_tuner.models.audio_vae.waveform import decode_waveform, encode_waveform

__all__ = [
    "AudioDecoder",
    "AudioEncoder",
    "AudioVAEConfig",
    "LogMel",
    "decode_waveform",
    "encode_waveform",
    "infer_section",
]
