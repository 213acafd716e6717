"""The audio-video diffusion transformer: noisy tokens of both streams to velocities.

B batch, T tokens, C latent channels, K distinct noise levels of a sample, W channels of a stream inside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ltx2_tuner.models.transformer.attention_backends import attention_function
from ltx2_tuner.models.transformer.block import BasicAVTransformerBlock, CrossInputs, StreamInputs
from ltx2_tuner.models.transformer.config import VARIANTS, TransformerConfig
from ltx2_tuner.models.transformer.masks import context_bias, key_bias, strength_bias
from ltx2_tuner.models.transformer.modality import Modality
from ltx2_tuner.models.transformer.modulation import spread
from ltx2_tuner.models.transformer.perturbations import Perturbations
from ltx2_tuner.models.transformer.rope import RopeTable, rope_table
from ltx2_tuner.models.transformer.timestep import TimestepModulation

BlockOutputs = tuple[Tensor | None, Tensor | None]
BlockRunner = Callable[..., BlockOutputs]

# Names of a stream's modules; the cross-modal ones exist in the variant "av" alone.
_NAMES = {
    "video": {
        "patchify": "patchify_proj",
        "adaln": "adaln_single",
        "prompt_adaln": "prompt_adaln_single",
        "caption": "caption_projection",
        "cross_adaln": "av_ca_video_scale_shift_adaln_single",
        "cross_gate": "av_ca_a2v_gate_adaln_single",
        "table": "scale_shift_table",
        "out": "proj_out",
    },
    "audio": {
        "patchify": "audio_patchify_proj",
        "adaln": "audio_adaln_single",
        "prompt_adaln": "audio_prompt_adaln_single",
        "caption": "audio_caption_projection",
        "cross_adaln": "av_ca_audio_scale_shift_adaln_single",
        "cross_gate": "av_ca_v2a_gate_adaln_single",
        "table": "audio_scale_shift_table",
        "out": "audio_proj_out",
    },
}

# Attention modules of each target of split attention.
ATTENTION_TARGETS = {
    "none": (),
    "self": ("attn1", "audio_attn1"),
    "text_cross": ("attn2", "audio_attn2"),
    "av_cross": ("audio_to_video_attn", "video_to_audio_attn"),
    "cross": ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    "video": ("attn1", "attn2"),
    "audio": ("audio_attn1", "audio_attn2"),
    "all": ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
}
FEED_FORWARD_TARGETS = {"none": (), "video": ("ff",), "audio": ("audio_ff",), "all": ("ff", "audio_ff")}


class CaptionProjection(nn.Module):
    """Text states to the width of a stream (LTX-2.0)."""

    def __init__(self, captions: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(captions, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(context), approximate="tanh"))


class LTXTransformer(nn.Module):
    """The transformer with the parameter names of a checkpoint below `model.diffusion_model.`.

    Args:
        config: sizes and switches.
        variant: "av"; "video" or "audio" leave out every module of the other stream and of the exchange.

    Attributes:
        block_runner: runs one block: `runner(block, index, video, audio, video_inputs, audio_inputs, perturbations)`
            returns the hidden states after it. Replace it to bring a block to the device first. Under gradient
            checkpointing it is called again, blocks in reverse order, while the backward pass recomputes; unless it
            has an attribute `recomputes` that is true, then it is called once, with `recompute=True`.
        before_blocks: None, or called before the first block of every pass.
        block_outputs: None, or called with `(index, video, audio)`, the hidden states after each block.
        blocks_alike: True has the first block compute a gradient of its inputs, which nobody needs, as all others do:
            compiled code then serves all of them.
        any_length: blocks are compiled for any number of tokens; set it before the attention backend is chosen.
    """

    def __init__(self, config: TransformerConfig, variant: str = "av") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; known are {', '.join(VARIANTS)}")
        self.config = config
        self.variant = variant
        self.streams = ("video", "audio") if variant == "av" else (variant,)
        for stream in self.streams:
            self._add_stream(stream)
        if config.use_keyframe_embedding and variant != "audio":
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, config.video_width))
        self.transformer_blocks = nn.ModuleList(
            BasicAVTransformerBlock(config, variant) for _ in range(config.num_layers)
        )
        self.block_runner: BlockRunner = run_block
        self.before_blocks: Callable[[], None] | None = None
        self.block_outputs: Callable[[int, Tensor | None, Tensor | None], None] | None = None
        self.blocks_alike = False
        self.any_length = False
        self._checkpointed: frozenset[int] = frozenset()

    def _add_stream(self, stream: str) -> None:
        config, names = self.config, _NAMES[stream]
        if stream == "video":
            width, inputs, outputs = config.video_width, config.in_channels, config.out_channels
            context = config.cross_attention_dim
        else:
            width, inputs, outputs = config.audio_width, config.audio_in_channels, config.audio_out_channels
            context = config.audio_cross_attention_dim
        self.add_module(names["patchify"], nn.Linear(inputs, width))
        self.add_module(names["adaln"], TimestepModulation(width, config.modulation_rows))
        if config.cross_attention_adaln and config.use_prompt_adaln:
            self.add_module(names["prompt_adaln"], TimestepModulation(context, 2))
        if not config.caption_proj_before_connector:
            self.add_module(names["caption"], CaptionProjection(config.caption_channels, context))
        if self.variant == "av":
            self.add_module(names["cross_adaln"], TimestepModulation(width, 4))
            self.add_module(names["cross_gate"], TimestepModulation(width, 1))
        self.register_parameter(names["table"], nn.Parameter(torch.empty(2, width)))
        self.add_module(names["out"], nn.Linear(width, outputs))

    def enable_gradient_checkpointing(
        self,
        enabled: bool = True,
        *,
        blocks: Collection[int] | None = None,
        saved_inputs: Callable[[], AbstractContextManager] = nullcontext,
        keep_products: bool = False,
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            blocks: which ones; None means all.
            saved_inputs: makes a context of saved-tensor hooks under which a block's hidden states are kept, for
                instance `torch.autograd.graph.save_on_cpu`.
            keep_products: let compiled blocks keep what is dear to compute; faster, in return for memory.

        Raises:
            ValueError: both of the latter are given.
        """
        if keep_products and saved_inputs is not nullcontext:
            raise ValueError("blocks that keep products keep their hidden states, too")
        chosen = range(len(self.transformer_blocks)) if blocks is None else blocks
        self._checkpointed = frozenset(chosen) if enabled else frozenset()
        for block in self.transformer_blocks:
            block.keep_products, block.saved_inputs = keep_products, saved_inputs

    def set_attention_backend(self, name: str) -> None:
        """Use `sdpa`, `flash_attn`, `flash3` or `xformers` in all blocks."""
        attend = attention_function(name, any_length=self.any_length)
        for module in self._block_modules("all", ATTENTION_TARGETS):
            module.attend = attend

    @contextmanager
    def attention_backend(self, name: str) -> Iterator[None]:
        """Another backend within the block, and afterwards what each attention had."""
        modules = list(self._block_modules("all", ATTENTION_TARGETS))
        before = [module.attend for module in modules]
        self.set_attention_backend(name)
        try:
            yield
        finally:
            for module, attend in zip(modules, before):
                module.attend = attend

    def split_attention(self, target: str, mode: str, query_chunk: int = 0) -> None:
        """Split the attentions of `target` (a key of ATTENTION_TARGETS) by "batch" or by "query" groups.

        Args:
            query_chunk: queries of a group; 0 means the default of 1024.
        """
        for module in self._block_modules(target, ATTENTION_TARGETS):
            module.split = mode
            module.query_chunk = query_chunk or module.query_chunk

    def chunk_feed_forward(self, target: str, tokens: int) -> None:
        """Run the feed-forwards of `target` (a key of FEED_FORWARD_TARGETS) `tokens` tokens at a time; 0: all."""
        for module in self._block_modules(target, FEED_FORWARD_TARGETS):
            module.chunk = tokens

    @property
    def feed_forwards(self) -> list[nn.Module]:
        """Of all blocks and streams."""
        return self._block_modules("all", FEED_FORWARD_TARGETS)

    def _block_modules(self, target: str, targets: dict[str, tuple[str, ...]]) -> list[nn.Module]:
        names = targets[target]
        return [getattr(block, name) for block in self.transformer_blocks for name in names if hasattr(block, name)]

    def forward(
        self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (B, T, C) of the streams given, in the working dtype; None for an absent one.

        Raises:
            ValueError: no stream is given, or one that this variant does not have.
        """
        given = {"video": video, "audio": audio}
        present = {stream: modality for stream, modality in given.items() if modality is not None}
        if not present:
            raise ValueError("the transformer was given neither video nor audio")
        for stream in present:
            if stream not in self.streams:
                raise ValueError(f"this transformer has no {stream} stream (variant {self.variant!r})")
        # A stream without tokens is like an absent one, except that it has an (empty) result.
        running = {stream: modality for stream, modality in present.items() if modality.latent.shape[1] > 0}
        hidden, inputs, embeddings = {}, {}, {}
        for stream, modality in running.items():
            hidden[stream], inputs[stream], embeddings[stream] = self._prepare(stream, modality)
        if len(running) == 2:
            for stream, other in (("video", "audio"), ("audio", "video")):
                cross = self._prepare_cross(stream, running[stream], running[other], hidden[stream].dtype)
                inputs[stream] = inputs[stream]._replace(cross=cross)
        hidden = self._run_blocks(hidden, inputs, perturbations)
        results = dict.fromkeys(given)
        for stream, modality in present.items():
            if stream in running:
                index = inputs[stream].index
                results[stream] = self._project_out(stream, hidden[stream], embeddings[stream], index)
            else:
                channels = self.get_submodule(_NAMES[stream]["out"]).weight.shape[0]
                results[stream] = modality.latent.new_zeros(*modality.latent.shape[:2], channels)
        return results["video"], results["audio"]

    def _run_blocks(
        self, hidden: dict[str, Tensor], inputs: dict[str, StreamInputs], perturbations: Perturbations | None
    ) -> dict[str, Tensor]:
        if not hidden:
            return hidden
        if self.before_blocks is not None:
            self.before_blocks()
        if self.blocks_alike:
            # Copies: a compiler that allows for other shapes would tell a view from what it is a view of.
            tracked = torch.is_grad_enabled()
            hidden.update({stream: states.clone().requires_grad_(tracked) for stream, states in hidden.items()})
        video, audio = hidden.get("video"), hidden.get("audio")
        first = video if video is not None else audio
        # A block that recomputes itself is compiled with its recomputation, which is faster than recomputing around it.
        by_itself = getattr(self.block_runner, "recomputes", False)
        for index, block in enumerate(self.transformer_blocks):
            skips = perturbations and perturbations.for_block(index, first.dtype, first.device)
            arguments = (video, audio, inputs.get("video"), inputs.get("audio"), skips)
            recompute = index in self._checkpointed and torch.is_grad_enabled()
            if recompute and by_itself:
                video, audio = self.block_runner(block, index, *arguments, recompute=True)
            elif recompute:
                with block.saved_inputs():
                    video, audio = checkpoint(self.block_runner, block, index, *arguments, use_reentrant=False)
            else:
                video, audio = self.block_runner(block, index, *arguments)
            if self.block_outputs is not None:
                self.block_outputs(index, video, audio)
        return {"video": video, "audio": audio}

    def _prepare(self, stream: str, modality: Modality) -> tuple[Tensor, StreamInputs, Tensor]:
        """Hidden states (B, T, W), the inputs of every block, and the embedded timesteps (B, K, W)."""
        config, names = self.config, _NAMES[stream]
        patchify = self.get_submodule(names["patchify"])
        x = patchify(modality.latent.to(patchify.weight.dtype))
        if stream == "video" and config.use_keyframe_embedding and modality.keyframe_marker is not None:
            marker = modality.keyframe_marker.unsqueeze(-1) > 0
            x = x + marker * self.keyframes_abs_pos_embedding.to(x.dtype)
        dtype = x.dtype
        levels, embedding = self.get_submodule(names["adaln"])(_levels(modality) * config.timestep_scale)
        context = modality.context.to(dtype)
        if not config.caption_proj_before_connector:
            context = self.get_submodule(names["caption"])(context)
        inputs = StreamInputs(
            levels=levels,
            index=modality.timestep_index,
            rope=self._rope(stream, modality.positions, dtype),
            context=context,
            context_bias=context_bias(modality.context_mask, dtype),
            context_levels=self._context_levels(names["prompt_adaln"], modality, context),
            self_bias=strength_bias(modality.attention_mask, dtype),
            text_keep=None if modality.text_keep is None else modality.text_keep.to(dtype).unsqueeze(-1),
            updated=modality.enabled,
        )
        return x, inputs, embedding

    def _context_levels(self, name: str, modality: Modality, context: Tensor) -> Tensor | None:
        """(B, 1, 2, W) modulation of the text keys and values by the sample's noise level, where there is one."""
        if not self.config.cross_attention_adaln:
            return None
        if not self.config.use_prompt_adaln:
            return context.new_zeros(context.shape[0], 1, 2, context.shape[-1])
        sigma = modality.sigma.float().unsqueeze(-1) * self.config.timestep_scale
        return self.get_submodule(name)(sigma)[0]

    def _prepare_cross(self, stream: str, own: Modality, other: Modality, dtype: torch.dtype) -> CrossInputs:
        names, config = _NAMES[stream], self.config
        levels, _ = self.get_submodule(names["cross_adaln"])(_levels(own) * config.timestep_scale)
        # Crosswise: what a stream takes from the other depends on how noisy the other is.
        sigma = other.sigma.float().unsqueeze(-1) * config.gate_timestep_scale
        gate, _ = self.get_submodule(names["cross_gate"])(sigma)
        bias, keep = key_bias(own.cross_mask, dtype) or (None, None)
        return CrossInputs(levels, gate, self._rope("cross", own.positions[:, :1], dtype), bias, keep)

    def _rope(self, use: str, positions: Tensor, dtype: torch.dtype) -> RopeTable:
        config = self.config
        video_limits, audio_limits = config.rope_max_positions, config.audio_rope_max_positions
        width, limits = {
            "video": (config.video_width, video_limits),
            "audio": (config.audio_width, audio_limits),
            "cross": (config.audio_cross_attention_dim, (max(video_limits[0], audio_limits[0]),)),
        }[use]
        return rope_table(
            positions,
            width,
            config.num_heads,
            limits,
            theta=config.rope_theta,
            double_precision=config.double_precision_frequencies,
            rope_type=config.rope_type,
            dtype=dtype,
        )

    def _project_out(self, stream: str, x: Tensor, embedding: Tensor, index: Tensor | None) -> Tensor:
        """LayerNorm, shift and scale in float32, then the projection to latent channels."""
        names = _NAMES[stream]
        rows = getattr(self, names["table"]).float() + embedding.float().unsqueeze(-2)  # (B, K, 2, W)
        if index is not None:
            rows = spread(rows, index)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.config.norm_eps)
        modulated = torch.addcmul(rows[:, :, 0], normed, 1 + rows[:, :, 1])
        return self.get_submodule(names["out"])(modulated.to(x.dtype))


def _levels(modality: Modality) -> Tensor:
    """Noise levels (B, K) in float32: in a smaller dtype they would be rounded before they are scaled."""
    timesteps = modality.timesteps.float()
    return timesteps.squeeze(-1) if timesteps.ndim == 3 else timesteps


def run_block(block: BasicAVTransformerBlock, index: int, *arguments: object, recompute: bool = False) -> BlockOutputs:
    """The default block runner: the block is where it has to be."""
    return block(*arguments, recompute=recompute)


run_block.recomputes = True
