"""R11: a LoRA through every file format gives the model the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer, write_tiny_checkpoint
from ltx2_tuner.cli.ltx2_convert_lora import main as convert
from ltx2_tuner.lora import LoRANetwork, Targets, load_lora, save_original, select_layers, table_of
from ltx2_tuner.lora.files import read_tensors
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.tokens import audio_positions, video_positions
from tests.lora.toy import randomise


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LTXTransformer:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_tiny_checkpoint(path, "2.3")
    return load_transformer(Checkpoint.open(path), "av", "cpu", torch.float32, progress=False)


@pytest.fixture(scope="module")
def streams(model) -> list[Modality]:
    generator = torch.Generator().manual_seed(0)

    def modality(tokens: int, channels: int, positions: torch.Tensor, stream: str) -> Modality:
        width = model.config.context_width(stream)
        sigma = torch.tensor([0.6])
        latent = torch.randn(1, tokens, channels, generator=generator)
        context = torch.randn(1, 8, width, generator=generator)
        return Modality(latent, sigma, sigma[:, None], positions, context)

    return [
        modality(8, model.config.in_channels, video_positions(2, 2, 2, 25.0), "video"),
        modality(6, model.config.audio_in_channels, audio_positions(6), "audio"),
    ]


@torch.no_grad()
def outputs(model: LTXTransformer, streams: list[Modality], network: LoRANetwork | None = None) -> list[torch.Tensor]:
    if network is None:
        return list(model(*streams))
    network.attach(model)
    try:
        return list(model(*streams))
    finally:
        network.detach()


def trained(model: LTXTransformer, part: str) -> LoRANetwork:
    """Ranks that differ from layer to layer, alpha unlike the rank; `part` all, some layers, or the sound alone."""
    layers = select_layers(model, Targets("av", "full"))
    if part == "some":
        layers = dict(list(layers.items())[::3])
    if part == "sound":
        layers = {path: layer for path, layer in layers.items() if "audio_" in path}
    network = LoRANetwork(layers, {path: 1 + i % 4 for i, path in enumerate(layers)}, 3.0)
    randomise(network)
    for _, adapter in network.adapters():
        adapter.lora_up.weight.data.mul_(0.05)
    return network


@pytest.mark.parametrize("part", ["all", "some", "sound"])
def test_outputs_survive_every_format(model, streams, part, tmp_path: Path):
    network = trained(model, part)
    expected = outputs(model, streams, network)
    plain = outputs(model, streams)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(expected, plain))
    path = tmp_path / "0.safetensors"
    save_original(path, network.matrices(), {})
    for step, target in enumerate(("comfy", "diffusers", "original"), start=1):
        following = tmp_path / f"{step}.safetensors"
        assert convert(["--input", str(path), "--output", str(following), "--target", target]) == 0
        path = following
        lora = load_lora(path, table_of(model))
        assert len(lora.modules) == len(network.paths) and lora.format == target
        for got, wanted in zip(outputs(model, streams, LoRANetwork.from_file(model, lora)), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        if target == "comfy":
            keys = read_tensors(path)[0]
            assert all(key.startswith("diffusion_model.transformer_blocks.") and "lora" in key for key in keys)
            assert not any(word in key for key in keys for word in ("alpha", "connector"))


def test_merging_into_the_model_gives_the_same_outputs(model, streams, tmp_path: Path):
    from ltx2_tuner.cli.ltx2_merge_lora_to_model import main as merge

    network = trained(model, "all")
    base, lora, merged = (tmp_path / f"{name}.safetensors" for name in ("base", "lora", "merged"))
    write_tiny_checkpoint(base, "2.3")
    save_original(lora, network.matrices(), {})
    argv = ["--ltx2_checkpoint", str(base), "--lora_weight", str(lora), "--lora_multiplier", "0.5"]
    assert merge([*argv, "--save_merged_model", str(merged)]) == 0
    loaded = load_transformer(Checkpoint.open(merged), "av", "cpu", torch.float32, progress=False)
    network.set_multiplier(0.5)
    for got, wanted in zip(outputs(loaded, streams), outputs(model, streams, network)):
        assert (got - wanted).norm() < 2e-2 * wanted.norm()  # the merged weights are rounded to bfloat16
