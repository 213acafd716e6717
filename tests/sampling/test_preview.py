"""Previews of a training run: what they leave alone, what they survive, and what their files say."""

from __future__ import annotations

import dataclasses
import json

import av
import pytest
import torch
from PIL import Image

from ltx2_tuner.lora import LoRANetwork, Targets, select_layers
from ltx2_tuner.models.transformer.attention_backends import sdpa
from ltx2_tuner.models.video_vae import tiling
from ltx2_tuner.sampling import decode
from ltx2_tuner.sampling import sampler as sampling
from ltx2_tuner.sampling.options import SamplingOptions, settle
from ltx2_tuner.sampling.preview import Previewer, settings_of
from ltx2_tuner.sampling.prompts import SamplePrompt
from ltx2_tuner.sampling.sampler import Sampler

CLIP = SamplePrompt("a cat walks", width=64, height=32, frame_count=9, sample_steps=1, seed=4, negative_prompt="blur")
PICTURE = SamplePrompt("a dog sits", width=32, height=32, frame_count=1, sample_steps=1, seed=5)


@pytest.fixture
def previewer(checkpoint, context, tmp_path):
    options = SamplingOptions(mode="video")
    sampler = Sampler(checkpoint, options, device=torch.device("cpu"), dtype=torch.float32, vae_dtype=torch.float32)
    requests = [settle(index, prompt, options) for index, prompt in enumerate((CLIP, PICTURE))]
    return Previewer(sampler, requests, [context] * 2, output_dir=tmp_path, output_name="my lora")


def test_files_say_how_they_were_made(previewer, transformer):
    clip, picture = previewer.sample(transformer, step=12)
    assert clip.name.startswith("my lora_000012_00_") and clip.name.endswith("_4.mp4")
    with av.open(str(clip)) as container:
        settings = json.loads(container.metadata["comment"])
    assert {key: settings[key] for key in ("prompt", "negative_prompt", "seed", "steps", "frames")} == {
        "prompt": "a cat walks",
        "negative_prompt": "blur",
        "seed": 4,
        "steps": 1,
        "frames": 9,
    }
    assert settings["video"]["cfg"] == 3.0, "the same default as in generation"
    assert json.loads(Image.open(picture).text["comment"])["prompt"] == "a dog sits"


def test_settings_name_media_without_their_folders(tmp_path):
    image = tmp_path / "somebody" / "face.png"
    request = settle(0, SamplePrompt("x", image_path=str(image)), SamplingOptions())
    text = settings_of(request)
    assert json.loads(text)["image"] == "face.png" and "somebody" not in text


def test_the_run_is_left_as_it_was(previewer, transformer):
    transformer.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    previewer.sample(transformer, step=1)
    assert torch.equal(before, torch.get_rng_state()) and transformer.training


def test_running_out_of_memory_while_decoding_is_met_by_tiles(previewer, transformer, monkeypatch, caplog):
    used = []
    real = tiling.decode

    def decode_once_too_large(decoder, latents, tiles=None):
        used.append(tiles)
        if tiles != sampling.SMALL_TILES:
            raise torch.OutOfMemoryError("no memory")
        return real(decoder, latents, tiles)

    monkeypatch.setattr(decode.tiling, "decode", decode_once_too_large)
    assert len(previewer.sample(transformer, step=1)) == 2
    assert used == [None, sampling.SMALL_TILES] * 2
    assert "trying again in small tiles" in caplog.text


def test_a_sample_that_fails_ends_neither_the_others_nor_the_run(previewer, transformer, monkeypatch, caplog):
    real = Sampler.denoise

    def denoise(self, model, request, *rest, **named):
        if request.index == 0:
            raise torch.OutOfMemoryError("no memory")
        return real(self, model, request, *rest, **named)

    monkeypatch.setattr(Sampler, "denoise", denoise)
    shown = []
    written = previewer.sample(transformer, step=1, on_sample=lambda index, files, sample: shown.append((index, files)))
    assert [path.suffix for path in written] == [".png"] and shown == [(1, written)]
    assert "sample 0 failed; training goes on" in caplog.text


def test_flat_samples_are_pointed_out(previewer, transformer, monkeypatch, caplog):
    monkeypatch.setattr(sampling, "decode_frames", lambda *_: torch.zeros(9, 32, 64, 3, dtype=torch.uint8))
    previewer.sample(transformer, step=1)
    assert "sample 0 is one flat colour: the adapter or the checkpoint may be broken" in caplog.text


def test_previews_use_the_adapter_as_it_stands(previewer, transformer):
    def pixels():
        return Image.open(previewer.sample(transformer, step=1)[1]).tobytes()

    network = LoRANetwork(select_layers(transformer, Targets("video", "t2v")), 4, 8.0)
    network.attach(transformer)
    before = pixels()
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.3)
    assert pixels() != before


@pytest.mark.parametrize("torch_attention", [False, True])
def test_torch_attention_can_be_asked_for_while_sampling(previewer, transformer, torch_attention):
    calls = []

    def kernel(*tensors):
        calls.append(1)
        return sdpa(*tensors)

    attention = transformer.transformer_blocks[0].attn1
    attention.attend = kernel
    sampler = previewer._sampler
    sampler.options = dataclasses.replace(sampler.options, torch_attention=torch_attention)
    previewer.sample(transformer, step=1)
    assert bool(calls) != torch_attention and attention.attend is kernel
