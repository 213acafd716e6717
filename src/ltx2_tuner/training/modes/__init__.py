"""Training modes: each turns a batch into model inputs and targets."""

from __future__ import annotations

from ltx2_tuner.training.modes.audio import AudioMode
from ltx2_tuner.training.modes.audio_reference import AudioReferenceAudioMode, AudioReferenceAVMode
from ltx2_tuner.training.modes.av import AVMode
from ltx2_tuner.training.modes.base import AudioReferenceOptions, Compute, Mode, ModeOptions, Prepared
from ltx2_tuner.training.modes.slider import ReferenceSliderMode, TextSliderMode
from ltx2_tuner.training.modes.v2v import V2VMode
from ltx2_tuner.training.modes.video import VideoMode

# (--ltx2_mode, settled --ic_lora_strategy or the kind of slider) -> mode.
MODES: dict[tuple[str, str], type[Mode]] = {
    ("video", "none"): VideoMode,
    ("video", "v2v"): V2VMode,
    ("av", "none"): AVMode,
    ("av", "audio_ref_only_ic"): AudioReferenceAVMode,
    ("audio", "none"): AudioMode,
    ("audio", "audio_ref_only_ic"): AudioReferenceAudioMode,
    # Sliders train the picture alone, in mode av too.
    ("video", "slider_text"): TextSliderMode,
    ("video", "slider_reference"): ReferenceSliderMode,
    ("av", "slider_text"): TextSliderMode,
    ("av", "slider_reference"): ReferenceSliderMode,
}

__all__ = [
    "MODES",
    "AVMode",
    "AudioMode",
    "AudioReferenceAVMode",
    "AudioReferenceAudioMode",
    "AudioReferenceOptions",
    "Compute",
    "Mode",
    "ModeOptions",
    "Prepared",
    "ReferenceSliderMode",
    "TextSliderMode",
    "V2VMode",
    "VideoMode",
]
