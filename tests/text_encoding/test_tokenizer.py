"""Token ids from every kind of source."""

from __future__ import annotations

import shutil

import pytest
import torch

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.text_encoding import write_tiny_gemma, write_tiny_gemma_file
from ltx2_tuner.text_encoding.tokenizer import Tokenizer, directory_tokenizer, embedded_tokenizer

BOS, PAD = 2, 0


def load(kind: str, folder) -> Tokenizer:
    if kind == "directory":
        return directory_tokenizer(write_tiny_gemma(folder / "gemma"))
    return embedded_tokenizer(SafetensorsFile(write_tiny_gemma_file(folder / "gemma.safetensors", tokenizer=kind)))


@pytest.mark.parametrize("kind", ["directory", "spiece_model", "tokenizer_json"])
def test_rules_hold_for_every_source(kind, tmp_path):
    tokenizer = load(kind, tmp_path)
    ids = tokenizer.encode("  a cat in the snow\n")
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert ids == tokenizer.encode("a cat in the snow")
    assert 1 not in ids  # EOS
    assert tokenizer.encode("") == [BOS]
    long = tokenizer.encode("a cat " * 500, length=128)
    assert len(long) == 128 and long == tokenizer.encode("a cat " * 500, length=129)[:-1]


def test_batch_is_padded_on_the_left(tmp_path):
    tokenizer = load("directory", tmp_path)
    ids, mask = tokenizer.encode_batch(["a cat in the snow", ""])
    assert mask.dtype == ids.dtype == torch.int64
    assert mask[0].all() and mask[1].tolist() == [0] * (ids.shape[1] - 1) + [1]
    assert ids[1].tolist() == [PAD] * (ids.shape[1] - 1) + [BOS]


def test_tokenizer_may_lie_in_a_folder_below(tmp_path):
    folder = write_tiny_gemma(tmp_path / "gemma")
    expected = directory_tokenizer(folder).encode("the wind")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / name, folder / "tokenizer" / name)
    assert directory_tokenizer(folder).encode("the wind") == expected


def test_wide_integers_are_bytes_too(tmp_path):
    source = SafetensorsFile(write_tiny_gemma_file(tmp_path / "a.safetensors"))
    wide = tmp_path / "wide.safetensors"
    write_safetensors(wide, {"spiece_model": source.read("spiece_model").to(torch.int32)})
    assert embedded_tokenizer(SafetensorsFile(wide)).encode("a fox") == embedded_tokenizer(source).encode("a fox")


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    folder = write_tiny_gemma(tmp_path / "gemma")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        directory_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds neither tokenizer"):
        directory_tokenizer(folder)
    damaged = tmp_path / "damaged.safetensors"
    write_safetensors(damaged, {"spiece_model": torch.arange(40, dtype=torch.uint8)})
    with pytest.raises(UserError, match=r"damaged.safetensors: its tokenizer cannot be read .* use --gemma_root"):
        embedded_tokenizer(SafetensorsFile(damaged))
