"""What one block keeps for the backward pass, and what a forward pass computes, from the shapes of a batch.

The units are hidden states of a stream (tokens x width x bytes of the compute dtype); they were calibrated on the
full-size LTX-2.3 with rank-32 adapters on all attentions, whose peak at 768x512x49 without recomputation is 67.4 GiB
with sound (and was 47.6 GiB without, when it was 69.6 with).
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx2_tuner.models.transformer import TransformerConfig

_OWN_UNITS = 19.8  # self-attention, queries to the text, feed-forward
_EXCHANGE_UNITS = 7.5  # attention to and from the other stream
_TEXT_UNITS = 4.0  # modulated text, its keys and values: per text token


@dataclass(frozen=True)
class BatchShape:
    """Tokens of all samples of a batch together; 0 for a stream that is absent. text: text tokens of one stream."""

    video: int
    audio: int
    text: int


def kept_bytes(config: TransformerConfig, shape: BatchShape, itemsize: int) -> int:
    """Of a block whose activations are kept."""
    units = _OWN_UNITS + (_EXCHANGE_UNITS if shape.video and shape.audio else 0.0)
    text = _TEXT_UNITS * shape.text * sum(width for width in _widths(config, shape))
    return round(itemsize * (units * _hidden(config, shape) + text))


def boundary_bytes(config: TransformerConfig, shape: BatchShape, itemsize: int) -> int:
    """Of a block that is recomputed: the hidden states it starts from, and none of those between its halves."""
    return itemsize * _hidden(config, shape)


def forward_operations(config: TransformerConfig, shape: BatchShape, samples: int) -> float:
    """Floating point operations of a forward pass; a multiplication with its addition counts 2."""
    video, audio, text = shape.video, shape.audio, shape.text
    products = 0.0
    for width, tokens in ((config.video_width, video), (config.audio_width, audio)):
        if tokens:
            products += 4 * width**2 * tokens + 2 * tokens**2 / samples * width  # self-attention
            products += 2 * width**2 * (tokens + text) + 2 * tokens * text / samples * width  # to the text
            products += 8 * width**2 * tokens  # feed-forward
    if video and audio:
        wide, narrow = config.video_width, config.audio_width
        products += 2 * (2 * wide * narrow * video + 2 * narrow**2 * audio + 2 * video * audio / samples * narrow)
    return 2.0 * products * config.num_layers


def _hidden(config: TransformerConfig, shape: BatchShape) -> int:
    """Values of the hidden states of both streams."""
    return shape.video * config.video_width + shape.audio * config.audio_width


def _widths(config: TransformerConfig, shape: BatchShape) -> list[int]:
    present = ((shape.video, config.video_width), (shape.audio, config.audio_width))
    return [width for tokens, width in present if tokens]
