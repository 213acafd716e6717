"""The .pt side files a user hands over: read as containers of tensors, never executed, never half used (R7, R10)."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.sampling.conditioning import read_latent_cache
from ltx2_tuner.sampling.contexts import load_container, read_prompt_cache
from ltx2_tuner.sampling.options import SamplingOptions, settle
from ltx2_tuner.sampling.prompts import SamplePrompt

OPTIONS = SamplingOptions(mode="video")
REQUESTS = [settle(0, SamplePrompt("a cat", width=64, height=64, frame_count=9), OPTIONS)]
WIDTHS = (8, 4)


def read_prompts(path: Path):
    return read_prompt_cache(path, REQUESTS, "video", WIDTHS)


def read_latents(path: Path):
    prompt = SamplePrompt("a cat", width=64, height=64, frame_count=9, image_path="a.png")
    return read_latent_cache(path, [settle(0, prompt, OPTIONS)], OPTIONS)


def prompt_file(path: Path) -> Path:
    embeds = torch.arange(32.0).reshape(4, 8)
    entry = {"prompt": "a cat", "negative_prompt": "", "prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    torch.save({"ltx_mode": "video", "prompt_cache": [entry]}, path)
    return path


def latent_file(path: Path) -> Path:
    entry = {"prompt_index": 0, "image_path": "a.png", "conditioning_latent": torch.zeros(1, 8, 1, 2, 2)}
    torch.save({"version": 1, "latent_cache": [entry]}, path)
    return path


FILES = [(prompt_file, read_prompts), (latent_file, read_latents)]


class Payload:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("read", [read_prompts, read_latents, lambda path: load_container(path, "make it again")])
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, read, write):
    path, victim = tmp_path / "cache.pt", tmp_path / "executed"
    write({"prompt_cache": [Payload(victim)], "latent_cache": [Payload(victim)]}, path)
    with pytest.raises(UserError, match=r"cache\.pt"):
        read(path)
    assert not victim.exists()


@pytest.mark.parametrize(("write", "read"), FILES)
def test_cut_and_flipped_files_are_refused_or_whole(tmp_path, write, read):
    path = write(tmp_path / "cache.pt")
    whole = path.read_bytes()
    read(path)
    draw = random.Random(0)
    for cut in [*range(5), *(draw.randrange(len(whole)) for _ in range(15))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cache\.pt"):
            read(path)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read(path)
        except UserError as error:
            assert "cache.pt" in str(error)


@pytest.mark.parametrize("read", [read_prompts, read_latents])
@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"prompt_cache": [[]], "latent_cache": [{"prompt_index": []}]},
        {"prompt_cache": 3, "latent_cache": 3},
        {"prompt_cache": [3], "latent_cache": [3]},
        {"prompt_cache": [{"prompt": 5}], "latent_cache": [{"prompt_index": "x"}]},
        {"prompt_cache": [{"prompt": "a cat", "prompt_embeds": "x"}], "latent_cache": [{"width": "x"}]},
        {"prompt_cache": [{"prompt": "a cat", "prompt_embeds": torch.zeros(3)}], "latent_cache": {"a": 1}},
    ],
)
def test_other_contents_are_refused_by_name(tmp_path, read, document):
    path = tmp_path / "cache.pt"
    torch.save(document, path)
    with pytest.raises(UserError, match=r"cache\.pt"):
        read(path)


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match="ltx2_cache_text_encoder_outputs"):
        read_prompts(tmp_path / "none.pt")
