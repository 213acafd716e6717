"""One block: self-attention and text attention of each stream, attention between the streams, feed-forward.

B batch, T tokens, S text tokens, K distinct noise levels of a sample, W channels of the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltx2_tuner.models.transformer.attention import Attention
from ltx2_tuner.models.transformer.config import TransformerConfig
from ltx2_tuner.models.transformer.feed_forward import FeedForward
from ltx2_tuner.models.transformer.modulation import Modulation, gate, modulate, norm_modulate, rms_norm
from ltx2_tuner.models.transformer.perturbations import BlockPerturbations
from ltx2_tuner.models.transformer.rope import RopeTable

# Rows of the modulation tables. The tables of the cross-modal attention hold the scale first, the others the shift.
SHIFT_SELF, SCALE_SELF, GATE_SELF, SHIFT_FF, SCALE_FF, GATE_FF, SHIFT_TEXT, SCALE_TEXT, GATE_TEXT = range(9)
SHIFT_CONTEXT, SCALE_CONTEXT = range(2)
A2V_SCALE, A2V_SHIFT, V2A_SCALE, V2A_SHIFT, CROSS_GATE = range(5)

_NOTHING_SKIPPED = BlockPerturbations()


class CrossInputs(NamedTuple):
    """What a stream brings to the attention between the streams."""

    levels: Tensor  # (B, K, 4, W) scales and shifts
    gate: Tensor  # (B, 1, 1, W) of what the stream receives, from the other stream's sigma
    rope: RopeTable  # of the time axis
    key_bias: Tensor | None = None  # (B, 1, 1, T): which tokens the other stream may attend to
    keep: Tensor | None = None  # (B, 1, 1): 0 for samples in which it may attend to none


class StreamInputs(NamedTuple):
    """What is the same for every block of a pass, for one stream."""

    levels: Tensor  # (B, K, 6 or 9, W) modulation rows
    index: Tensor | None  # (B, T): which of the K levels a token has
    rope: RopeTable
    context: Tensor  # (B, S, W)
    context_bias: Tensor | None = None  # (B, 1, 1 or T, S)
    context_levels: Tensor | None = None  # (B, 1, 2, W) modulation of the context; None where it is not modulated
    self_bias: Tensor | None = None  # (B, 1, 1 or T, T)
    text_keep: Tensor | None = None  # (B, T, 1)
    cross: CrossInputs | None = None  # None when the other stream is absent
    updated: bool = True  # False: the stream is only attended to


class BasicAVTransformerBlock(nn.Module):
    """A block of the variant "av", "video" or "audio"; the modules of an absent stream do not exist."""

    def __init__(self, config: TransformerConfig, variant: str = "av") -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.modulates_text = config.cross_attention_adaln
        kind = {"gated": config.apply_gated_attention, "eps": config.norm_eps}
        heads, rows = config.num_heads, config.modulation_rows
        if variant != "audio":
            width, head_dim = config.video_width, config.head_dim
            self.attn1 = Attention(width, width, heads, head_dim, **kind)
            self.attn2 = Attention(width, config.cross_attention_dim, heads, head_dim, **kind)
            self.ff = FeedForward(width, bias=config.ff_bias)
            self.scale_shift_table = nn.Parameter(torch.empty(rows, width))
            if self.modulates_text:
                self.prompt_scale_shift_table = nn.Parameter(torch.empty(2, config.cross_attention_dim))
        if variant != "video":
            width, head_dim = config.audio_width, config.audio_head_dim
            self.audio_attn1 = Attention(width, width, heads, head_dim, **kind)
            self.audio_attn2 = Attention(width, config.audio_cross_attention_dim, heads, head_dim, **kind)
            self.audio_ff = FeedForward(width, bias=config.audio_ff_bias)
            self.audio_scale_shift_table = nn.Parameter(torch.empty(rows, width))
            if self.modulates_text:
                self.audio_prompt_scale_shift_table = nn.Parameter(torch.empty(2, config.audio_cross_attention_dim))
        if variant == "av":
            video, audio, head_dim = config.video_width, config.audio_width, config.audio_head_dim
            self.audio_to_video_attn = Attention(video, audio, heads, head_dim, **kind)
            self.video_to_audio_attn = Attention(audio, video, heads, head_dim, **kind)
            self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.empty(5, video))
            self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.empty(5, audio))

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_inputs: StreamInputs | None,
        audio_inputs: StreamInputs | None,
        perturbations: BlockPerturbations | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (B, T, W) of both streams to those after the block; an absent stream is None throughout."""
        skips = _NOTHING_SKIPPED if perturbations is None else perturbations
        video_runs = video is not None and video_inputs.updated
        audio_runs = audio is not None and audio_inputs.updated
        if video_runs:
            modulation = Modulation(self.scale_shift_table, video_inputs.levels, video_inputs.index)
            hidden = norm_modulate(video, modulation, SCALE_SELF, SHIFT_SELF, self.eps)
            update = self.attn1(hidden, mask=video_inputs.self_bias, rope=video_inputs.rope, skip=skips.skip_video_self)
            video = gate(video, update, modulation, GATE_SELF)
            table = self.prompt_scale_shift_table if self.modulates_text else None
            video = self._read_text(self.attn2, video, video_inputs, modulation, table)
        if audio_runs:
            audio_modulation = Modulation(self.audio_scale_shift_table, audio_inputs.levels, audio_inputs.index)
            hidden = norm_modulate(audio, audio_modulation, SCALE_SELF, SHIFT_SELF, self.eps)
            update = self.audio_attn1(
                hidden, mask=audio_inputs.self_bias, rope=audio_inputs.rope, skip=skips.skip_audio_self
            )
            audio = gate(audio, update, audio_modulation, GATE_SELF)
            table = self.audio_prompt_scale_shift_table if self.modulates_text else None
            audio = self._read_text(self.audio_attn2, audio, audio_inputs, audio_modulation, table)
        if video is not None and audio is not None and video_inputs.cross is not None:
            video, audio = self._exchange(video, audio, video_inputs, audio_inputs, skips)
        if video_runs:
            video = self._feed_forward(self.ff, video, modulation)
        if audio_runs:
            audio = self._feed_forward(self.audio_ff, audio, audio_modulation)
        return video, audio

    def _read_text(
        self, attention: Attention, x: Tensor, inputs: StreamInputs, modulation: Modulation, table: Tensor | None
    ) -> Tensor:
        context = inputs.context
        if self.modulates_text:
            query = norm_modulate(x, modulation, SCALE_TEXT, SHIFT_TEXT, self.eps)
            context = modulate(context, Modulation(table, inputs.context_levels), SCALE_CONTEXT, SHIFT_CONTEXT)
        else:
            query = rms_norm(x, self.eps)
        update = attention(query, context, mask=inputs.context_bias)
        if inputs.text_keep is not None:
            update = update * inputs.text_keep
        return gate(x, update, modulation, GATE_TEXT) if self.modulates_text else x + update.to(x.dtype)

    def _exchange(
        self,
        video: Tensor,
        audio: Tensor,
        video_inputs: StreamInputs,
        audio_inputs: StreamInputs,
        skips: BlockPerturbations,
    ) -> tuple[Tensor, Tensor]:
        """Attention in both directions; each reads the other stream as it was before either was updated."""
        video_cross, audio_cross = video_inputs.cross, audio_inputs.cross
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        of_video = Modulation(video_table[:CROSS_GATE], video_cross.levels, video_inputs.index)
        of_audio = Modulation(audio_table[:CROSS_GATE], audio_cross.levels, audio_inputs.index)
        video_before, audio_before = video, audio
        if video_inputs.updated and not _skips_all(skips.skip_a2v):
            update = self.audio_to_video_attn(
                norm_modulate(video_before, of_video, A2V_SCALE, A2V_SHIFT, self.eps),
                norm_modulate(audio_before, of_audio, A2V_SCALE, A2V_SHIFT, self.eps),
                mask=audio_cross.key_bias,
                rope=video_cross.rope,
                key_rope=audio_cross.rope,
            )
            update = _drop(update, audio_cross.keep, skips.skip_a2v)
            video = gate(video, update, Modulation(video_table[CROSS_GATE:], video_cross.gate), 0)
        if audio_inputs.updated and not _skips_all(skips.skip_v2a):
            update = self.video_to_audio_attn(
                norm_modulate(audio_before, of_audio, V2A_SCALE, V2A_SHIFT, self.eps),
                norm_modulate(video_before, of_video, V2A_SCALE, V2A_SHIFT, self.eps),
                mask=video_cross.key_bias,
                rope=audio_cross.rope,
                key_rope=video_cross.rope,
            )
            update = _drop(update, video_cross.keep, skips.skip_v2a)
            audio = gate(audio, update, Modulation(audio_table[CROSS_GATE:], audio_cross.gate), 0)
        return video, audio

    def _feed_forward(self, feed_forward: FeedForward, x: Tensor, modulation: Modulation) -> Tensor:
        hidden = norm_modulate(x, modulation, SCALE_FF, SHIFT_FF, self.eps)
        return gate(x, feed_forward(hidden), modulation, GATE_FF)


def _skips_all(skip: object) -> bool:
    return skip is not None and skip.keep is None


def _drop(update: Tensor, keep: Tensor | None, skip: object) -> Tensor:
    """Zero the update of samples that have nothing to attend to or whose attention is skipped."""
    if keep is not None:
        update = update * keep
    return update if skip is None else update * skip.keep
