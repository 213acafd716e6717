"""Prompts to the text context that the transformer attends to."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx2_tuner.checkpoint import Checkpoint, load_text_connectors
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.text import TextConnectors
from ltx2_tuner.text_encoding.gemma import SMALLER, GemmaSource, load_gemma, open_gemma
from ltx2_tuner.text_encoding.options import GemmaOptions
from ltx2_tuner.text_encoding.tokenizer import MAX_TOKENS, Tokenizer, directory_tokenizer, embedded_tokenizer


@dataclass(frozen=True)
class PromptEmbedding:
    """Context of one prompt on the CPU: video (S, Dv), audio (S, Da) or None, mask (S,) int64, all ones."""

    video: Tensor
    audio: Tensor | None
    mask: Tensor


class TextEncoder:
    """Gemma, projection and connectors. `gemma_id` is the fingerprint of Gemma's weights.

    Args:
        gemma: any model called with input_ids, attention_mask, position_ids that returns all hidden states.
        length: tokens of a context; a multiple of the number of registers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        gemma: nn.Module,
        connectors: TextConnectors,
        device: torch.device,
        gemma_id: str,
        length: int = MAX_TOKENS,
    ) -> None:
        self.tokenizer = tokenizer
        self.gemma: nn.Module | None = gemma
        self.connectors: TextConnectors | None = connectors
        self.device = device
        self.gemma_id = gemma_id
        self.length = length

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> list[PromptEmbedding]:
        """Encode prompts, `batch_size` in one pass; each result depends on its own prompt only.

        Padding that all prompts of a pass share is not computed: it takes part in nothing, and the connectors fill
        the context up to `length`. Positions stay those of the padded prompt.
        """
        if self.gemma is None:
            raise RuntimeError("this encoder was closed")
        starts = range(0, len(prompts), batch_size)
        return [result for start in starts for result in self._encode_batch(prompts[start : start + batch_size])]

    @torch.no_grad()
    def _encode_batch(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        ids, mask = self.tokenizer.encode_batch(prompts, self.length)
        positions = torch.arange(self.length - ids.shape[1], self.length, device=self.device)[None]
        mask = mask.to(self.device)
        try:
            output = self.gemma(
                input_ids=ids.to(self.device),
                attention_mask=mask,
                position_ids=positions.expand(len(ids), -1),
                output_hidden_states=True,
                use_cache=False,
            )
            context = self.connectors(output.hidden_states, mask, tokens=self.length)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"encoding {len(prompts)} prompts at once ran out of memory; lower --batch_size or {SMALLER}"
            ) from error
        video, ones = context.video.cpu(), context.mask.cpu()
        audio = None if context.audio is None else context.audio.cpu()
        return [
            PromptEmbedding(video[row].clone(), None if audio is None else audio[row].clone(), ones[row].clone())
            for row in range(len(prompts))
        ]

    def close(self) -> None:
        """Free all weights. Quantised models hold reference cycles, so only a collection gives their memory back."""
        self.gemma = self.connectors = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_text_encoder(
    gemma: GemmaOptions, checkpoint: Checkpoint, mode: str, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load projection and connectors, then Gemma.

    Args:
        checkpoint: has the projection and the connectors.
        mode: video, av or audio; video leaves the audio connector out.
        dtype: compute dtype, and that of the result.

    Raises:
        UserError: connector weights are missing (before Gemma is touched), or Gemma cannot be loaded.
    """
    connectors = load_text_connectors(checkpoint, device, dtype, mode)
    source = open_gemma(gemma)
    try:
        _check_fit(source, connectors)
        tokenizer = _tokenizer(source)
        identity = source.weights.fingerprint()
        model = load_gemma(source, device, dtype)
    finally:
        source.close()
    return TextEncoder(tokenizer, model, connectors, device, identity)


def read_gemma_id(options: GemmaOptions) -> str:
    """`gemma_id` of Gemma's files without loading them: 16 hex digits over names, types, shapes and sampled bytes."""
    source = open_gemma(options)
    try:
        return source.weights.fingerprint()
    finally:
        source.close()


def _check_fit(source: GemmaSource, connectors: TextConnectors) -> None:
    wanted = (connectors.config.hidden, connectors.config.states - 1)
    found = (source.config.hidden_size, source.config.num_hidden_layers)
    if found != wanted:
        raise UserError(
            f"{source.options.source}: is a Gemma with hidden size {found[0]} and {found[1]} layers, the checkpoint "
            f"was trained with hidden size {wanted[0]} and {wanted[1]} layers; give Gemma 3 12B"
        )


def _tokenizer(source: GemmaSource) -> Tokenizer:
    options = source.options
    if options.safetensors is not None:
        tokenizer = embedded_tokenizer(source.files[0])
        if tokenizer is not None:
            return tokenizer
        if options.root is None:
            raise UserError(
                f"--gemma_safetensors {options.safetensors}: holds no tokenizer (spiece_model or tokenizer_json); "
                "use --gemma_root instead, or give it too"
            )
    return directory_tokenizer(options.root)
