"""One block: self-attention and text attention of each stream, attention between the streams, feed-forward.

B batch, T tokens, S text tokens, K distinct noise levels of a sample, W channels of the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ltx2_tuner.models.transformer.attention import Attention
from ltx2_tuner.models.transformer.config import TransformerConfig
from ltx2_tuner.models.transformer.feed_forward import FeedForward
from ltx2_tuner.models.transformer.modulation import Modulation, gate, modulate, norm_modulate, rms_norm
from ltx2_tuner.models.transformer.opening import Opening
from ltx2_tuner.models.transformer.perturbations import BlockPerturbations, Skip
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


def recomputable(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A part of a block that with `recompute=True` keeps nothing but its inputs for the backward pass.

    Inside the part and not around it, so that compiling the part compiles the recomputation too: it is fused into the
    backward pass, and what only the part's result needs is not computed again. A compiler takes a plain checkpoint
    for advice and keeps the products of big matrices; unless `block.keep_products` allows that, it is told not to.
    """

    @functools.wraps(part)
    def run(block: BasicAVTransformerBlock, *arguments: object, recompute: bool = False) -> Tensor:
        if not (recompute and torch.is_grad_enabled()):
            return part(block, *arguments)
        if torch.compiler.is_compiling() and not block.keep_products:
            return checkpoint(part, block, *arguments, use_reentrant=False, context_fn=_recompute_everything)
        return checkpoint(part, block, *arguments, use_reentrant=False)

    # Code of its own: a compiler keeps what it knows of a function, such as the shapes it has met, with its code.
    run.__code__ = run.__code__.replace(co_name=part.__name__)
    return run


def _always(context: object, operation: object, *arguments: object, **keywords: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


_recompute_everything = functools.partial(create_selective_checkpoint_contexts, _always)
# torch keeps compilations on disk only where it knows what the policy does; this says so. Change it with the policy.
_recompute_everything.cache_hash = "recompute everything"


class BasicAVTransformerBlock(nn.Module):
    """A block of the variant "av", "video" or "audio"; the modules of an absent stream do not exist.

    Attributes:
        keep_products: compiled, recomputation may keep what is dear to compute: a third of the memory it would save.
        saved_inputs: makes the context in which a recomputed block saves its hidden states; not with `keep_products`.
    """

    def __init__(self, config: TransformerConfig, variant: str = "av") -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.modulates_text = config.cross_attention_adaln
        self.keep_products = False
        self.saved_inputs: Callable[[], AbstractContextManager] = nullcontext
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
        *,
        recompute: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (B, T, W) of both streams to those after the block; an absent stream is None throughout.

        With `recompute` the backward pass makes the activations anew from the hidden states given.
        """
        skips = _NOTHING_SKIPPED if perturbations is None else perturbations
        video_runs = video is not None and video_inputs.updated
        audio_runs = audio is not None and audio_inputs.updated
        opening = self.opening(recompute)
        if video_runs:
            video = opening(self.open_video, video, video_inputs, skips.skip_video_self)
        if audio_runs:
            audio = opening(self.open_audio, audio, audio_inputs, skips.skip_audio_self)
        opened_video, opened_audio = video, audio
        with opening.closing():
            if video_runs:
                arguments = (video, opened_audio, video_inputs, audio_inputs, skips.skip_a2v)
                video = self.close_video(*arguments, recompute=recompute)
            if audio_runs:
                arguments = (audio, opened_video, audio_inputs, video_inputs, skips.skip_v2a)
                audio = self.close_audio(*arguments, recompute=recompute)
        return video, audio

    def opening(self, recompute: bool) -> Opening:
        """What runs `open_*` in a pass."""
        return Opening(recompute, self.keep_products or torch.compiler.is_compiling(), self.saved_inputs)

    # A block has four parts, for those who compile it or run the two streams side by side: `open_*` is attention
    # within the stream and to its text, `close_*` is attention to the other stream as it was opened and the
    # feed-forward. Each part depends on one stream's weights alone, but for the tables of the exchange.

    @recomputable
    def open_video(self, video: Tensor, inputs: StreamInputs, skip: Skip | None) -> Tensor:
        modulation = Modulation(self.scale_shift_table, inputs.levels, inputs.index)
        video = self._read_itself(self.attn1, video, inputs, modulation, skip)
        table = self.prompt_scale_shift_table if self.modulates_text else None
        return self._read_text(self.attn2, video, inputs, modulation, table)

    @recomputable
    def open_audio(self, audio: Tensor, inputs: StreamInputs, skip: Skip | None) -> Tensor:
        modulation = Modulation(self.audio_scale_shift_table, inputs.levels, inputs.index)
        audio = self._read_itself(self.audio_attn1, audio, inputs, modulation, skip)
        table = self.audio_prompt_scale_shift_table if self.modulates_text else None
        return self._read_text(self.audio_attn2, audio, inputs, modulation, table)

    @recomputable
    def close_video(
        self,
        video: Tensor,
        audio: Tensor | None,
        inputs: StreamInputs,
        other: StreamInputs | None,
        skip: Skip | None,
    ) -> Tensor:
        if audio is not None and inputs.cross is not None and not _skips_all(skip):
            of_video = Modulation(self.scale_shift_table_a2v_ca_video, inputs.cross.levels, inputs.index)
            of_audio = Modulation(self.scale_shift_table_a2v_ca_audio, other.cross.levels, other.index)
            update = self.audio_to_video_attn(
                norm_modulate(video, of_video, A2V_SCALE, A2V_SHIFT, self.eps),
                norm_modulate(audio, of_audio, A2V_SCALE, A2V_SHIFT, self.eps),
                mask=other.cross.key_bias,
                rope=inputs.cross.rope,
                key_rope=other.cross.rope,
            )
            update = _drop(update, other.cross.keep, skip)
            video = gate(video, update, _cross_gate(of_video.table, inputs.cross), 0)
        modulation = Modulation(self.scale_shift_table, inputs.levels, inputs.index)
        return self._feed_forward(self.ff, video, modulation)

    @recomputable
    def close_audio(
        self,
        audio: Tensor,
        video: Tensor | None,
        inputs: StreamInputs,
        other: StreamInputs | None,
        skip: Skip | None,
    ) -> Tensor:
        if video is not None and inputs.cross is not None and not _skips_all(skip):
            of_audio = Modulation(self.scale_shift_table_a2v_ca_audio, inputs.cross.levels, inputs.index)
            of_video = Modulation(self.scale_shift_table_a2v_ca_video, other.cross.levels, other.index)
            update = self.video_to_audio_attn(
                norm_modulate(audio, of_audio, V2A_SCALE, V2A_SHIFT, self.eps),
                norm_modulate(video, of_video, V2A_SCALE, V2A_SHIFT, self.eps),
                mask=other.cross.key_bias,
                rope=inputs.cross.rope,
                key_rope=other.cross.rope,
            )
            update = _drop(update, other.cross.keep, skip)
            audio = gate(audio, update, _cross_gate(of_audio.table, inputs.cross), 0)
        modulation = Modulation(self.audio_scale_shift_table, inputs.levels, inputs.index)
        return self._feed_forward(self.audio_ff, audio, modulation)

    def _read_itself(
        self, attention: Attention, x: Tensor, inputs: StreamInputs, modulation: Modulation, skip: Skip | None
    ) -> Tensor:
        hidden = norm_modulate(x, modulation, SCALE_SELF, SHIFT_SELF, self.eps)
        update = attention(hidden, mask=inputs.self_bias, rope=inputs.rope, skip=skip)
        return gate(x, update, modulation, GATE_SELF)

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

    def _feed_forward(self, feed_forward: FeedForward, x: Tensor, modulation: Modulation) -> Tensor:
        hidden = norm_modulate(x, modulation, SCALE_FF, SHIFT_FF, self.eps)
        return gate(x, feed_forward(hidden), modulation, GATE_FF)


def _cross_gate(table: Tensor, cross: CrossInputs) -> Modulation:
    """The last row of a table of the exchange gates what the stream receives."""
    return Modulation(table[CROSS_GATE:], cross.gate)


def _skips_all(skip: Skip | None) -> bool:
    return skip is not None and skip.keep is None


def _drop(update: Tensor, keep: Tensor | None, skip: Skip | None) -> Tensor:
    """Zero the update of samples that have nothing to attend to or whose attention is skipped."""
    if keep is not None:
        update = update * keep
    return update if skip is None else update * skip.keep
