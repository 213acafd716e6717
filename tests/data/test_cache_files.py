from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ltx2_tuner.data.cache_files import (
    NonFiniteError,
    read_audio,
    read_header,
    read_latents,
    read_text,
    split_dtype,
    write_audio,
    write_latents,
    write_text,
)
from ltx2_tuner.errors import UserError


def keys(path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_latents_round_trip(tmp_path):
    path = tmp_path / "a_0064x0032_ltx2.safetensors"
    latents = torch.randn(4, 3, 1, 2).bfloat16()
    write_latents(path, latents, {"frame_count": 17, "width": "64"})
    assert keys(path) == {"latents_3x1x2_bfloat16"}
    cache = read_latents(path)
    assert torch.equal(cache.latents, latents) and cache.virtual is None
    assert cache.metadata == {
        "architecture": "ltx2_v1",
        "format_version": "1.0.1",
        "frame_count": "17",
        "width": "64",
    }


def test_virtual_geometry_round_trips(tmp_path):
    path = tmp_path / "a.safetensors"
    write_latents(path, torch.zeros(4, 1, 1, 1, dtype=torch.float16), {}, (16, 2, 2))
    assert "ltx2_virtual_num_frames_int32" in keys(path)
    assert read_latents(path).virtual == (16, 2, 2)


def test_audio_round_trips(tmp_path):
    path = tmp_path / "a.safetensors"
    latents = torch.randn(8, 5, 16).half()
    write_audio(path, latents, {}, length=4)
    assert keys(path) == {"audio_latents_5x16x8_float16", "audio_lengths_int32"}
    cache = read_audio(path)
    assert torch.equal(cache.latents, latents) and cache.length == 4


@pytest.mark.parametrize("legacy", [False, True])
def test_text_round_trips(tmp_path, legacy):
    path = tmp_path / "a.safetensors"
    video, audio, mask = torch.randn(5, 6), torch.randn(5, 3), torch.tensor([1, 1, 1, 0, 0])
    write_text(path, video, audio, mask, {"caption1": "größe\n2"}, legacy_keys=legacy)
    joined = {"text_float32", "text_mask"} if legacy else set()
    assert (
        keys(path) == {"video_prompt_embeds_float32", "audio_prompt_embeds_float32", "prompt_attention_mask"} | joined
    )
    cache = read_text(path)
    assert torch.equal(cache.video, video) and torch.equal(cache.audio, audio) and torch.equal(cache.mask, mask)
    assert cache.metadata["caption1"] == "größe\n2"


def test_text_without_audio(tmp_path):
    path = tmp_path / "a.safetensors"
    write_text(path, torch.randn(5, 6), None, torch.ones(5), {})
    assert read_text(path).audio is None


@pytest.mark.parametrize(
    ("width", "video_width", "expected"),
    [(9, 6, (6, 3)), (6, 6, (6, None)), (7680, None, (3840, 3840)), (6144, None, (4096, 2048))],
)
def test_a_joined_embedding_alone_is_split(tmp_path, width, video_width, expected):
    path = tmp_path / "a.safetensors"
    save_file({"text_bf16": torch.randn(2, width).bfloat16(), "text_mask": torch.ones(2)}, path)
    cache = read_text(path, video_width)
    assert (cache.video.shape[1], None if cache.audio is None else cache.audio.shape[1]) == expected


@pytest.mark.parametrize("token", ["fp16", "float16"])
def test_short_dtype_names_are_read(tmp_path, token):
    path = tmp_path / "a.safetensors"
    tensors = {f"audio_latents_5x16x8_{token}": torch.zeros(8, 5, 16).half(), "audio_lengths_int32": torch.tensor(9)}
    save_file(tensors, path)
    assert read_audio(path).length == 5  # never more than there are


def test_dtype_suffixes():
    assert split_dtype("latents_1x2x3_float8_e4m3fn") == ("latents_1x2x3", torch.float8_e4m3fn)
    assert split_dtype("prompt_attention_mask") == ("prompt_attention_mask", None)
    assert split_dtype("text_mask") == ("text_mask", None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    path = tmp_path / "a.safetensors"
    latents = torch.zeros(4, 1, 1, 1)
    latents[2] = bad
    with pytest.raises(NonFiniteError, match="1 of 4 values"):
        write_latents(path, latents, {})
    with pytest.raises(NonFiniteError):
        write_audio(path, latents[2], {})
    with pytest.raises(NonFiniteError):
        write_text(path, latents[:, :, 0, 0], None, torch.ones(4), {})
    assert list(tmp_path.iterdir()) == []


def test_equal_content_gives_equal_bytes(tmp_path):
    latents = torch.randn(4, 1, 1, 1)
    names = [f"key{number}" for number in range(20)]
    for file in ("a", "b"):
        random.shuffle(names)
        write_latents(tmp_path / file, latents, dict.fromkeys(names, "x"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_headers_are_read_without_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_latents(path, torch.zeros(4, 3, 1, 2), {"bucket": "64x32"}, (3, 2, 2))
    header = read_header(path)
    assert header.shape == (4, 3, 1, 2) and header.is_ours and header.metadata["bucket"] == "64x32"
    assert "ltx2_virtual_height" in header.shapes
    write_audio(path, torch.zeros(8, 5, 16), {})
    assert read_header(path).shape == (8, 5, 16)
    write_text(path, torch.zeros(5, 6), torch.zeros(5, 3), torch.ones(5), {})
    assert read_header(path).shapes["audio_prompt_embeds"] == (5, 3)


def test_names_that_lie_about_the_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"latents_3x1x2_bfloat16": torch.zeros(4, 3, 2, 1)}, path)
    with pytest.raises(UserError, match="does not fit a tensor of shape"):
        read_latents(path)
    save_file({"latents_1x1x1_float32": torch.zeros(4, 1, 1, 1), "latents_1x1x1_bf16": torch.zeros(4, 1, 1, 1)}, path)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        read_latents(path)


def test_other_kinds_of_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    for read in (read_latents, read_audio, read_text, read_header):
        with pytest.raises(UserError, match=r"a\.safetensors"):
            read(path)
        with pytest.raises(UserError, match="gone"):
            read(tmp_path / "missing.safetensors")
        with pytest.raises(UserError):
            read(tmp_path)


def sample(tmp_path):
    path = tmp_path / "a.safetensors"
    write_audio(path, torch.randn(8, 5, 16), {"source_path": "x.mp4"}, length=5)
    return path, path.read_bytes()


def test_cut_files_are_refused(tmp_path):
    path, content = sample(tmp_path)
    for cut in [0, 1, 7, 8, 9, *range(20, len(content) - 1, len(content) // 15), len(content) - 1]:
        path.write_bytes(content[:cut])
        for read in (read_audio, read_header):
            with pytest.raises(UserError, match=r"a\.safetensors"):
                read(path)


def test_flipped_header_bits_are_refused_or_change_metadata_alone(tmp_path):
    path, content = sample(tmp_path)
    (length,) = struct.unpack("<Q", content[:8])
    original = json.loads(content[8 : 8 + length])
    generator = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(8 + length)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read_audio(path)
        except UserError as error:
            assert "a.safetensors" in str(error)
        else:
            header = json.loads(damaged[8 : 8 + length])
            original_tensors, tensors = (
                {k: v for k, v in h.items() if k != "__metadata__"} for h in (original, header)
            )
            # A damaged name of the length tensor only costs the padding information; the sizes must agree.
            assert [v["shape"] for v in tensors.values()] == [v["shape"] for v in original_tensors.values()]


@pytest.mark.skipif(os.name == "nt", reason="permissions work otherwise on Windows")
def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError):
        write_latents(blocked / "a.safetensors", torch.zeros(4, 1, 1, 1), {})
