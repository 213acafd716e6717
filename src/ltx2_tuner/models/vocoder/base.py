"""What every vocoder offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Vocoder(nn.Module):
    """Log-mel (B, 2, frames, bins) -> waveform (B, 2, S) in [-1, 1] at `output_rate` samples/s.

    Keep the weights in float32: the anti-aliased kind accumulates the rounding of half precision. Parameters are
    named as in a checkpoint below `vocoder.`.
    """

    output_rate: int

    @staticmethod
    def from_config(section: Mapping[str, Any]) -> Vocoder:
        """The vocoder of a checkpoint's `vocoder` section, with bandwidth extension where it has a `bwe` object."""
        # These modules import this one.
        from ltx2_tuner.models.vocoder.config import ExtensionConfig, GeneratorConfig
        from ltx2_tuner.models.vocoder.extension import ExtendedVocoder
        from ltx2_tuner.models.vocoder.generator import Generator

        if section.get("bwe"):
            return ExtendedVocoder(ExtensionConfig.from_dict(section))
        return Generator(GeneratorConfig.from_dict(section))
