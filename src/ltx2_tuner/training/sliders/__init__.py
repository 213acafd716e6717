"""Slider LoRAs: one direction, learned from opposite passes at multipliers +1 and -1."""

from __future__ import annotations

from ltx2_tuner.training.sliders.config import SliderConfig, SliderTarget, load_slider_config, parse_range
from ltx2_tuner.training.sliders.reference import ReferencePairs, slider_data
from ltx2_tuner.training.sliders.text import Geometry, TargetTexts, TextTargets
from ltx2_tuner.training.sliders.trainer import SliderTrainer

__all__ = [
    "Geometry",
    "ReferencePairs",
    "SliderConfig",
    "SliderTarget",
    "SliderTrainer",
    "TargetTexts",
    "TextTargets",
    "load_slider_config",
    "parse_range",
    "slider_data",
]
