"""Reading official checkpoints: headers, configs, versions, streaming loads, fingerprints."""

from ltx2_tuner.checkpoint.checkpoint import Checkpoint, check_version
from ltx2_tuner.checkpoint.components import (
    load_audio_decoder,
    load_audio_encoder,
    load_text_connectors,
    load_video_decoder,
    load_video_encoder,
    load_vocoder,
)
from ltx2_tuner.checkpoint.fingerprint import component_id
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from ltx2_tuner.checkpoint.tiny import write_tiny_checkpoint
from ltx2_tuner.checkpoint.transformer_loader import load_transformer

__all__ = [
    "Checkpoint",
    "SafetensorsFile",
    "TensorEntry",
    "check_version",
    "component_id",
    "load_audio_decoder",
    "load_audio_encoder",
    "load_text_connectors",
    "load_transformer",
    "load_video_decoder",
    "load_video_encoder",
    "load_vocoder",
    "write_tiny_checkpoint",
]
