"""Embeddings of the preservation prompts: from the cache file, or from a text encoder at the start of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import Modality, TransformerConfig
from ltx2_tuner.sampling.contexts import TextIdentity, load_container
from ltx2_tuner.training.regularizers.options import PreservationOptions

_FLAGS = {"blank": "--blank_preservation", "dop": "--dop"}


@dataclass(frozen=True)
class Prompt:
    """Text of one prompt: video (S, Dv), audio (S, Da) or None, mask (S,) or None when all ones."""

    video: Tensor
    audio: Tensor | None
    mask: Tensor | None

    def placed(self, device: torch.device) -> Prompt:
        """The same on the device where it is used in every step."""
        mask = self.mask
        if mask is not None:
            mask = None if bool(mask.bool().all()) else mask.to(device)
        return Prompt(self.video.to(device), None if self.audio is None else self.audio.to(device), mask)

    def on(self, modality: Modality, context: Tensor) -> Modality:
        """A stream's inputs with this text for every sample; `context` is the embedding for that stream."""
        count, device = modality.latent.shape[0], modality.latent.device
        mask = None if self.mask is None else self.mask.to(device).expand(count, -1)
        embedded = context.to(device, modality.context.dtype).expand(count, -1, -1)
        return dataclasses.replace(modality, context=embedded, context_mask=mask)


@dataclass(frozen=True)
class PreservationPrompts:
    """The prompts that a run needs; None for the others."""

    blank: Prompt | None = None
    dop: Prompt | None = None

    @property
    def has_sound(self) -> bool:
        """Whether every prompt has an embedding for the sound stream."""
        return all(prompt.audio is not None for prompt in (self.blank, self.dop) if prompt is not None)


def wanted_texts(options: PreservationOptions) -> dict[str, str]:
    """Name of a technique -> the prompt it preserves."""
    texts = {"blank": ""} if options.blank is not None else {}
    return texts if options.dop is None else {**texts, "dop": options.dop_class}


def encode_prompts(options: PreservationOptions, encoder) -> PreservationPrompts:
    """Encode what the options need.

    Args:
        encoder: a `TextEncoder`.
    """
    texts = wanted_texts(options)
    distinct = list(dict.fromkeys(texts.values()))
    found = dict(zip(distinct, encoder.encode(distinct)))
    return PreservationPrompts(
        **{
            name: Prompt(found[text].video.cpu(), _host(found[text].audio), found[text].mask.cpu())
            for name, text in texts.items()
        }
    )


def read_prompts(
    path: Path,
    options: PreservationOptions,
    mode: str,
    model: TransformerConfig,
    made_with: TextIdentity | None = None,
) -> PreservationPrompts:
    """The prompts in `ltx2_preservation_cache.pt`. Without a class in the options, that of the file is taken.

    Args:
        made_with: text encoder that the file must come from; with `known` the class has to be the options' too.

    Raises:
        UserError: no such file, a prompt is missing, made for another class, mode or checkpoint.
    """
    texts = wanted_texts(options)
    document = load_container(path, _remedy(options, mode))
    if made_with is not None:
        made_with.check(path, document, _remedy(options, mode))
    cached_class = document.get("dop_class_prompt")
    exact = bool(options.dop_class) or (made_with is not None and made_with.known)
    if "dop" in texts and "dop_embed" in document and exact and cached_class != options.dop_class:
        raise UserError(
            f"{path}: was made for the class '{cached_class}', but --dop_args says class={options.dop_class}; "
            f"give the same class, or {_remedy(options, mode)}"
        )
    return PreservationPrompts(**{name: _prompt(path, document, name, options, mode, model) for name in texts})


def _prompt(
    path: Path,
    document: Mapping[str, object],
    name: str,
    options: PreservationOptions,
    mode: str,
    model: TransformerConfig,
) -> Prompt:
    remedy = _remedy(options, mode)
    video, mask = document.get(f"{name}_embed"), document.get(f"{name}_mask")
    audio = document.get(f"{name}_audio_embed")
    if not isinstance(video, torch.Tensor) or not isinstance(mask, torch.Tensor):
        raise UserError(f"{path}: holds no prompt for {_FLAGS[name]}; {remedy}")
    if mode == "audio" and not isinstance(audio, torch.Tensor):
        raise UserError(f"{path}: holds no sound embedding for {_FLAGS[name]}; {remedy}")
    streams = {"video": (video, mode != "audio"), "audio": (audio, mode != "video")}
    for stream, (embedding, used) in streams.items():
        if not used or embedding is None:
            continue
        width = model.context_width(stream)
        if embedding.ndim != 2 or embedding.shape[1] != width or mask.shape != embedding.shape[:1]:
            raise UserError(
                f"{path}: the {stream} embedding for {_FLAGS[name]} is {list(embedding.shape)}, the checkpoint takes "
                f"width {width}; {remedy}"
            )
    return Prompt(video, audio if mode != "video" else None, mask)


def _remedy(options: PreservationOptions, mode: str) -> str:
    flags = [_FLAGS[name] for name in wanted_texts(options)]
    if options.dop is not None:
        flags.append(f'--dop_class_prompt "{options.dop_class}"')
    return (
        f"run ltx2_cache_text_encoder_outputs.py --ltx2_mode {mode} --precache_preservation_prompts {' '.join(flags)}"
    )


def _host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
