"""Parts of a LoRA, and merged LoRAs in a real transformer."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer, write_tiny_checkpoint
from ltx2_tuner.lora.formats import LoRAFile, LoRAMatrices
from ltx2_tuner.lora.merging import merge_concat
from ltx2_tuner.lora.network import LoRANetwork
from ltx2_tuner.lora.parts import part_of, scale_parts
from ltx2_tuner.lora.targets import linear_layers
from ltx2_tuner.models.transformer import Modality
from ltx2_tuner.models.transformer.tokens import audio_positions, video_positions


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("transformer_blocks.3.attn1.to_q", "video"),
        ("transformer_blocks.3.ff.net.2", "video"),
        ("transformer_blocks.3.audio_attn2.to_out.0", "audio"),
        ("transformer_blocks.3.audio_ff.net.0.proj", "audio"),
        ("transformer_blocks.3.audio_to_video_attn.to_k", "cross"),
        ("transformer_blocks.3.video_to_audio_attn.to_v", "cross"),
        ("audio_patchify_proj", "audio"),
        ("proj_out", "video"),
    ],
)
def test_parts(path, part):
    assert part_of(path) == part


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_tiny_checkpoint(path, version="2.3")
    return load_transformer(Checkpoint.open(path), "av", "cpu", torch.float32, progress=False)


def random_lora(model, seed: int, share: float) -> LoRAFile:
    """A LoRA of rank 3 on a share of the layers."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, layer in linear_layers(model):
        if path.startswith("transformer_blocks.") and torch.rand(1, generator=generator) < share:
            down = torch.randn(3, layer.in_features, generator=generator) * 0.1
            modules[path] = LoRAMatrices(down, torch.randn(layer.out_features, 3, generator=generator) * 0.1, 2.0)
    return LoRAFile(f"lora{seed}", "original", modules)


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    config = model.config

    def modality(stream: str, channels: int, positions: torch.Tensor) -> Modality:
        sigma = torch.tensor([0.6])
        return Modality(
            latent=torch.randn(1, positions.shape[2], channels, generator=generator),
            sigma=sigma,
            timesteps=sigma[:, None],
            positions=positions,
            context=torch.randn(1, 8, config.context_width(stream), generator=generator),
        )

    with torch.no_grad():
        return model(
            modality("video", config.in_channels, video_positions(2, 2, 2, 25.0)),
            modality("audio", config.audio_in_channels, audio_positions(6)),
        )


def test_a_merged_lora_is_both_loras(model):
    loras, multipliers = [random_lora(model, 1, 0.7), random_lora(model, 2, 0.7)], [0.8, -0.5]
    plain = outputs(model)
    both = [LoRANetwork.from_file(model, lora, multiplier=m) for lora, m in zip(loras, multipliers)]
    for network in both:
        network.attach(model)
    together = outputs(model)
    for network in reversed(both):
        network.detach()
    merged = LoRAFile("merged", "original", merge_concat(loras, multipliers))
    network = LoRANetwork.from_file(model, merged).attach(model)
    found = outputs(model)
    network.detach()
    for one, two, none in zip(found, together, plain):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        assert (one - none).abs().max() > 0.01


def test_a_dropped_part_does_nothing_and_a_scaled_one_is_scaled(model):
    lora = random_lora(model, 3, 1.0)
    kept, dropped = scale_parts(lora.modules, {"audio": 0.0, "cross": 0.0, "video": 0.5})
    assert dropped["audio"] and dropped["cross"] and not dropped["video"]
    assert all(part_of(path) == "video" for path in kept)
    for path, module in kept.items():
        torch.testing.assert_close(module.delta(), lora.modules[path].delta(0.5))
    network = LoRANetwork.from_file(model, LoRAFile("video", "original", kept)).attach(model)
    with_lora = outputs(model)
    network.detach()
    assert not torch.equal(with_lora[0], outputs(model)[0])
