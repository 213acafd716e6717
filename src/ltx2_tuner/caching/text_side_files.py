"""The `.pt` files of prompt embeddings: sample prompts and preservation prompts (plain containers of tensors)."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx2_tuner.data.cache_files import NonFiniteError
from ltx2_tuner.files import atomic_write
from ltx2_tuner.text_encoding import PromptEmbedding, TextEncoder


class SideFile(ABC):
    """A file of prompt embeddings that one run of the text script writes whole."""

    path: Path

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """Distinct texts to encode."""

    @property
    @abstractmethod
    def contexts(self) -> int:
        """How many embeddings the file holds, for the size estimate."""

    @abstractmethod
    def content(self, encoded: dict[str, PromptEmbedding], mode: str) -> dict:
        """The container to save."""

    def write(self, encoder: TextEncoder, mode: str, made_with: Mapping[str, str] | None = None) -> None:
        """Encode the texts one by one and write the file atomically; equal embeddings give equal bytes.

        Args:
            made_with: fingerprints of the encoder, which the file keeps.

        Raises:
            UserError: an embedding is not finite.
        """
        self.save(dict(zip(self.texts, encoder.encode(self.texts))), mode, made_with)

    def save(self, encoded: dict[str, PromptEmbedding], mode: str, made_with: Mapping[str, str] | None = None) -> None:
        """Write the file of embeddings that are known already, by their texts.

        Raises:
            UserError: an embedding is not finite.
        """
        for text, embedding in encoded.items():
            _check_finite(self.path, text, embedding)
        # Saved through memory: the name of the file would otherwise become part of its bytes.
        buffer = io.BytesIO()
        torch.save({**self.content(encoded, mode), **(made_with or {})}, buffer)
        with atomic_write(self.path) as file:
            file.write(buffer.getbuffer())


@dataclass(frozen=True)
class SamplePromptsFile(SideFile):
    """`ltx2_sample_prompts_cache.pt`: (prompt, negative prompt) pairs in the order of the prompt file."""

    path: Path
    prompts: Sequence[tuple[str, str]]

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(text for pair in self.prompts for text in pair))

    @property
    def contexts(self) -> int:
        return 2 * len(self.prompts)

    def content(self, encoded: dict[str, PromptEmbedding], mode: str) -> dict:
        entries = []
        for prompt, negative in self.prompts:
            entry: dict[str, object] = {}
            for name, text in (("prompt", prompt), ("negative_prompt", negative)):
                entry[name] = text
                entry[f"{name}_embeds"] = _joined(encoded[text], mode)
                entry[f"{name}_attention_mask"] = encoded[text].mask.clone()
            entries.append(entry)
        return {"version": 2, "ltx_mode": mode, "audio_video": mode == "av", "prompt_cache": entries}


@dataclass(frozen=True)
class PreservationFile(SideFile):
    """`ltx2_preservation_cache.pt`: the empty prompt and the class prompt, those that are asked for."""

    path: Path
    blank: bool
    class_prompt: str | None

    @property
    def _parts(self) -> dict[str, str]:
        parts = {"blank": ""} if self.blank else {}
        return parts if self.class_prompt is None else {**parts, "dop": self.class_prompt}

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(self._parts.values()))

    @property
    def contexts(self) -> int:
        return len(self._parts)

    def content(self, encoded: dict[str, PromptEmbedding], mode: str) -> dict:
        result: dict[str, object] = {"version": 1, "audio_video": mode == "av"}
        for name, text in self._parts.items():
            embedding = encoded[text]
            result[f"{name}_embed"] = embedding.video.clone()
            result[f"{name}_mask"] = embedding.mask.clone()
            if embedding.audio is not None:
                result[f"{name}_audio_embed"] = embedding.audio.clone()
        if self.class_prompt is not None:
            result["dop_class_prompt"] = self.class_prompt
        return result


def _joined(embedding: PromptEmbedding, mode: str) -> Tensor:
    """What a sample's context is cached as: video (S, Dv), av (S, Dv + Da), audio (S, Da)."""
    if mode == "video":
        return embedding.video.clone()
    if mode == "audio":
        return embedding.audio.clone()
    return torch.cat((embedding.video, embedding.audio), dim=-1)


def _check_finite(path: Path, text: str, embedding: PromptEmbedding) -> None:
    for tensor in (embedding.video, embedding.audio):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{path.name}: the embedding of '{text}' is not finite; nothing was written, try --mixed_precision bf16"
            )
