"""What the checkpoint says about its text side: projection of Gemma's hidden states and the two connectors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

GEMMA_HIDDEN = 3840
GEMMA_STATES = 49  # embedding output and 48 layers
_CONNECTOR_MAX_POSITION = 4096
# The four keys that tell the text path of LTX-2.3, with the only values that are known to be trained.
_SEPARATE_PROJECTION_KEYS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


@dataclass(frozen=True)
class ConnectorConfig:
    """One stack of transformer blocks over text tokens; its width is `heads * head_dim`."""

    heads: int
    head_dim: int
    layers: int
    gated: bool
    registers: int = 128
    max_position: int = _CONNECTOR_MAX_POSITION
    rope_type: str = "split"
    double_precision: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text side.

    `separate_projections` is the 2.3 path: one biased projection per stream, hidden states normalised per token.
    Without it (2.0) one bias-free projection serves both streams and normalisation is per prompt.
    """

    hidden: int
    states: int
    separate_projections: bool
    video: ConnectorConfig
    audio: ConnectorConfig

    @classmethod
    def from_dict(cls, config: Mapping, shapes: Shapes | None = None) -> TextConfig:
        """Read the `transformer` section of a checkpoint's config.

        Args:
            config: the section; missing keys take the values of the released checkpoints.
            shapes: shapes of the checkpoint's tensors by name without `model.diffusion_model.`. They fill what the
                section leaves out and are checked against what it says.

        Raises:
            ValueError: values that contradict each other, naming the keys.
        """
        shapes = shapes or {}
        separate = _separate_projections(config, shapes)
        projection = shapes.get(f"text_embedding_projection.{'video_' if separate else ''}aggregate_embed.weight")
        hidden = config.get("caption_channels", GEMMA_HIDDEN)
        states = projection[1] // hidden if projection else GEMMA_STATES
        if projection and states * hidden != projection[1]:
            raise ValueError(
                f"the text projection takes {projection[1]} inputs, which is no multiple of caption_channels = {hidden}"
            )
        default_heads = 32 if separate else 30
        video = _connector(config, "connector", "video", shapes, default_heads, separate)
        audio = _connector(config, "audio_connector", "audio", shapes, default_heads, separate)
        return cls(hidden, states, separate, video, audio)


def _separate_projections(config: Mapping, shapes: Shapes) -> bool:
    found = {key: config[key] for key in _SEPARATE_PROJECTION_KEYS if key in config}
    by_tensors = "text_embedding_projection.video_aggregate_embed.weight" in shapes
    if not found:
        return by_tensors
    if found == _SEPARATE_PROJECTION_KEYS:
        return True
    # Some re-packed files keep only the two `..._linear` keys.
    linears = ("caption_projection_first_linear", "caption_projection_second_linear")
    in_transformer = any(name.startswith("caption_projection.") for name in shapes)
    if by_tensors and not in_transformer and found == dict.fromkeys(linears, False):
        return True
    listed = ", ".join(f"{key} = {found.get(key, 'absent')}" for key in _SEPARATE_PROJECTION_KEYS)
    raise ValueError(f"no known text path has {listed}")


def _connector(
    config: Mapping, prefix: str, stream: str, shapes: Shapes, default_heads: int, separate: bool
) -> ConnectorConfig:
    def value(name: str, default):
        return config.get(f"{prefix}_{name}", config.get(f"connector_{name}", default))

    head_dim = value("attention_head_dim", 64 if stream == "audio" and separate else 128)
    heads = value("num_attention_heads", default_heads)
    layers = value("num_layers", 8 if separate else 2)
    gated = value("apply_gated_attention", separate)
    registers = value("num_learnable_registers", 128)
    base = f"{stream}_embeddings_connector."
    table = shapes.get(base + "learnable_registers")
    if table:
        blocks = re.compile(re.escape(base) + r"transformer_1d_blocks\.(\d+)\.")
        layers = 1 + max((int(match[1]) for match in map(blocks.match, shapes) if match), default=-1)
        gate = shapes.get(base + "transformer_1d_blocks.0.attn1.to_gate_logits.weight")
        gated = gate is not None
        registers = table[0]
        if gate:
            heads = gate[0]
            head_dim = table[1] // heads
        elif heads * head_dim != table[1] and f"{prefix}_num_attention_heads" not in config:
            heads = table[1] // head_dim
        if heads * head_dim != table[1]:
            raise ValueError(
                f"the {stream} connector is {table[1]} wide, but {prefix}_num_attention_heads x "
                f"{prefix}_attention_head_dim = {heads} x {head_dim}"
            )
    return ConnectorConfig(
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        gated=gated,
        registers=registers,
        max_position=_max_position(config),
        rope_type=config.get("rope_type", "split"),
        double_precision=config.get("frequencies_precision", "float64") == "float64",
    )


def _max_position(config: Mapping) -> int:
    limits = config.get("connector_positional_embedding_max_pos")
    if limits is None:
        # A limit of 1 (the class default elsewhere) would make the model ignore prompts; all released files say 4096.
        if config:
            logger.warning("connector_positional_embedding_max_pos is missing; using %d", _CONNECTOR_MAX_POSITION)
        return _CONNECTOR_MAX_POSITION
    return limits[0]
