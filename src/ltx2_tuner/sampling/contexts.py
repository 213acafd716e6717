"""Text contexts of the prompts to sample: encoded now, or read from a precached file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.sampling.options import Request

logger = logging.getLogger(__name__)

RECACHE = "re-run ltx2_cache_text_encoder_outputs.py with --precache_sample_prompts and this prompt file"


@dataclasses.dataclass(frozen=True)
class PromptContext:
    """Text contexts of one prompt, each (1, S, D) on the CPU; absent ones are None."""

    video: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    negative_video: torch.Tensor | None = None
    negative_audio: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class TextIdentity:
    """What a file of embeddings must have been made with.

    component, gemma: fingerprints of the checkpoint's text side and of Gemma, None where the run does not know.
    policy: `error`, `warn` or `off` for a file of another (--cache_check_mode). known: a file that does not say what
    made it is refused as well.
    """

    component: str
    gemma: str | None = None
    policy: str = "error"
    known: bool = False

    def check(self, path: Path, document: Mapping[str, object], remedy: str) -> None:
        """Whether the file fits.

        Raises:
            UserError: it does not, and the policy is `error`.
        """
        wanted = {"component_id": ("checkpoint", self.component), "gemma_id": ("Gemma", self.gemma)}
        for key, (maker, identity) in wanted.items():
            found = document.get(key)
            if identity is None or found == identity or self.policy == "off" or (found is None and not self.known):
                continue
            text = f"{path}: " + (
                f"was made with another {maker}" if found else f"does not say which {maker} it was made with"
            )
            if self.policy == "error":
                raise UserError(f"{text}; {remedy}")
            logger.warning("%s; it is used all the same", text)


def encode_contexts(encoder, requests: Sequence[Request]) -> list[PromptContext]:
    """Encode every distinct prompt and negative prompt once.

    Args:
        encoder: a `TextEncoder` (its `encode` returns embeddings with `video`, `audio` (S, D) and `mask`).
    """
    texts = [request.prompt.prompt for request in requests]
    texts += [request.negative_prompt for request in requests if request.needs_negative]
    distinct = list(dict.fromkeys(texts))
    encoded = dict(zip(distinct, encoder.encode(distinct)))

    def context(request: Request) -> PromptContext:
        positive = encoded[request.prompt.prompt]
        negative = encoded[request.negative_prompt] if request.needs_negative else None
        return PromptContext(
            _batched(positive.video),
            _batched(positive.audio),
            _batched(negative.video) if negative else None,
            _batched(negative.audio) if negative else None,
        )

    return [context(request) for request in requests]


def read_prompt_cache(
    path: str | Path,
    requests: Sequence[Request],
    mode: str,
    widths: tuple[int, int],
    made_with: TextIdentity | None = None,
) -> list[PromptContext]:
    """Contexts from `ltx2_sample_prompts_cache.pt`; Gemma is never loaded instead.

    Args:
        widths: text context widths the transformer takes, (video, audio).
        made_with: text encoder that the file must come from.

    Raises:
        UserError: the file is missing, no such cache, or does not fit the prompt file or the mode.
    """
    path = Path(path)
    document = load_container(path, RECACHE)
    if made_with is not None:
        made_with.check(path, document, RECACHE)
    entries = document.get("prompt_cache")
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds no prompt_cache list; {RECACHE}")
    if document.get("ltx_mode", mode) != mode:
        raise UserError(f"{path}: was made for mode {document['ltx_mode']}, this run is {mode}; {RECACHE}")
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: an entry of its prompt_cache is no table; {RECACHE}")
    if len(entries) != len(requests):
        raise UserError(f"{path}: holds {len(entries)} prompts, the prompt file has {len(requests)}; {RECACHE}")
    return [_cached_context(path, entry, request, mode, widths) for entry, request in zip(entries, requests)]


def _cached_context(path: Path, entry: dict, request: Request, mode: str, widths: tuple[int, int]) -> PromptContext:
    for kind, wanted in (("prompt", request.prompt.prompt), ("negative_prompt", request.negative_prompt)):
        if kind == "negative_prompt" and not request.needs_negative:
            continue
        found = str(entry.get(kind, ""))
        if " ".join(found.split()) != " ".join(wanted.split()):
            raise UserError(f"{path}: sample {request.index}: {kind} is '{found}', expected '{wanted}'; {RECACHE}")
    video, audio = _split(path, entry, "prompt_embeds", request.index, mode, widths)
    negative_video = negative_audio = None
    if request.needs_negative:
        negative_video, negative_audio = _split(path, entry, "negative_prompt_embeds", request.index, mode, widths)
    return PromptContext(video, audio, negative_video, negative_audio)


def _split(
    path: Path, entry: dict, key: str, index: int, mode: str, widths: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    embeds = entry.get(key)
    expected = {"video": (widths[0], 0), "audio": (0, widths[1]), "av": widths}[mode]
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2 or embeds.shape[1] != sum(expected):
        found = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else "nothing"
        raise UserError(f"{path}: sample {index}: {key} is {found}, expected width {sum(expected)}; {RECACHE}")
    video, audio = embeds.split(expected, dim=1)
    return _batched(video if expected[0] else None), _batched(audio if expected[1] else None)


def _batched(embedding: torch.Tensor | None) -> torch.Tensor | None:
    return None if embedding is None else embedding[None].cpu()


def load_container(path: Path, remedy: str) -> dict:
    """A `.pt` side file read as plain containers of tensors only; nothing in it is executed.

    Raises:
        UserError: missing, damaged, or holding anything but plain containers.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except Exception as error:  # a damaged file makes the unpickler raise whatever its bytes happen to say
        raise UserError(f"{path}: is damaged or no cache of this toolkit; {remedy}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: is no cache of this toolkit; {remedy}")
    return document
