"""Gemma feature extraction and the text connectors (pure torch)."""

from ltx2_tuner.models.text.config import ConnectorConfig, TextConfig
from ltx2_tuner.models.text.connectors import TextConnectors, TextContext

__all__ = ["ConnectorConfig", "TextConfig", "TextConnectors", "TextContext"]
