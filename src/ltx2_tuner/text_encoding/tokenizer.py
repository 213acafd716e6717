"""Captions to token ids, from a Hugging Face directory or from the tokenizer inside a single weights file.

All sources obey the same rules: the stripped text, BOS first, never EOS, the first `length` tokens, padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.errors import UserError

MAX_TOKENS = 1024
_PAD = 0
_EOS = 1
_BOS = 2


@dataclass(frozen=True)
class Tokenizer:
    """`encode_text` returns ids with or without BOS; everything else follows from the two special ids."""

    encode_text: Callable[[str], list[int]]
    bos_id: int
    pad_id: int

    def count(self, caption: str) -> int:
        """Tokens of one caption, BOS included, however many."""
        return len(self._ids(caption))

    def encode(self, caption: str, length: int = MAX_TOKENS) -> list[int]:
        """Ids of one caption, at most `length`; an empty caption is BOS alone."""
        return self._ids(caption)[:length]

    def _ids(self, caption: str) -> list[int]:
        ids = list(self.encode_text(caption.strip()))
        if not ids or ids[0] != self.bos_id:
            ids.insert(0, self.bos_id)
        return ids

    def encode_batch(self, captions: Sequence[str], length: int = MAX_TOKENS) -> tuple[Tensor, Tensor]:
        """Ids and mask of several captions, (B, S) int64 each, padded on the left to the longest one (S <= length)."""
        rows = [self.encode(caption, length) for caption in captions]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        return ids, mask


def directory_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory; it may lie in a folder below it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = _folder_with(directory, "tokenizer.json") or _folder_with(directory, "tokenizer.model")
    if folder is None:
        raise UserError(
            f"--gemma_root {directory}: holds neither tokenizer.json nor tokenizer.model; give a complete folder"
        )
    prepare_torchaudio()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files surface as many types of a third-party library
        raise UserError(f"{folder}: its tokenizer cannot be read ({error}); download the folder again") from error
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _BOS
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, _PAD)
    pad = next(value for value in pads if value is not None)
    return Tokenizer(lambda text: tokenizer(text)["input_ids"], bos, pad)


def _folder_with(directory: Path, name: str) -> Path | None:
    if (directory / name).is_file():
        return directory
    return next((path.parent for path in sorted(directory.rglob(name))), None)


def embedded_tokenizer(file: SafetensorsFile) -> Tokenizer | None:
    """The tokenizer stored in a single weights file as bytes, None when there is none.

    Raises:
        UserError: the bytes are no tokenizer.
    """
    try:
        if "spiece_model" in file.tensors:
            return _sentencepiece(_stored_bytes(file, "spiece_model"))
        if "tokenizer_json" in file.tensors:
            return _tokenizer_json(_stored_bytes(file, "tokenizer_json"))
    except UserError:
        raise
    except Exception as error:  # the two libraries raise plain RuntimeError and Exception
        raise UserError(f"{file.path}: its tokenizer cannot be read ({error}); use --gemma_root instead") from error
    return None


def _stored_bytes(file: SafetensorsFile, name: str) -> bytes:
    return file.read(name).to(torch.uint8).numpy().tobytes()


def _sentencepiece(model: bytes) -> Tokenizer:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    bos = processor.bos_id() if processor.bos_id() >= 0 else _BOS
    pad = processor.pad_id() if processor.pad_id() >= 0 else processor.eos_id()
    return Tokenizer(processor.encode, bos, pad)


def _tokenizer_json(text: bytes) -> Tokenizer:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def special(name: str, default: int) -> int:
        found = tokenizer.token_to_id(name)
        return default if found is None else found

    return Tokenizer(
        lambda value: tokenizer.encode(value).ids, special("<bos>", _BOS), special("<pad>", special("<eos>", _EOS))
    )
