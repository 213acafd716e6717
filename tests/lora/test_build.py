"""Networks from options: the built-in one, what it starts from, and any module of the kohya protocol."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from torch import nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora import save_comfy
from ltx2_tuner.lora.build import build_network, optimizer_groups, target_of
from ltx2_tuner.lora.layer import LoRALinear
from ltx2_tuner.lora.options import NetworkOptions
from tests.lora.toy import ToyTransformer, randomise


def test_built_in_is_attached_and_described(caplog):
    model = ToyTransformer(1)
    with caplog.at_level(logging.INFO):
        network = build_network(model, NetworkOptions(dim=4, alpha=4.0), mode="av", seed=1)
    assert isinstance(model.get_submodule("transformer_blocks.0.attn1.to_q"), LoRALinear)
    assert "LoRA on 24 layers (video attention 8, audio attention 8, audio to video 4, video to audio 4)" in caplog.text
    groups, names = optimizer_groups(network, 1e-4, 1e-5)
    assert names == ["unet_video", "unet_audio"] and [group["lr"] for group in groups] == [1e-4, 1e-5]


def test_dim_from_weights_takes_everything_from_the_file(tmp_path):
    trained = build_network(ToyTransformer(1), NetworkOptions(dim=3, alpha=6.0, preset="v2v"), mode="video", seed=1)
    randomise(trained)
    path = tmp_path / "x.safetensors"
    save_comfy(path, trained.matrices(), {})
    options = NetworkOptions(dim=16, alpha=1.0, weights=path, dim_from_weights=True)
    network = build_network(ToyTransformer(1), options, mode="video", seed=1)
    assert {adapter.rank for _, adapter in network.adapters()} == {3}
    wanted = dict(trained.adapters())
    for layer, adapter in network.adapters():
        torch.testing.assert_close(adapter.delta(), wanted[layer].delta(), rtol=1e-5, atol=1e-5)


def test_dim_from_weights_leaves_out_what_does_not_run(tmp_path):
    trained = build_network(ToyTransformer(1), NetworkOptions(dim=2, alpha=2.0), mode="av", seed=1)
    path = tmp_path / "x.safetensors"
    save_comfy(path, trained.matrices(), {})
    options = NetworkOptions(weights=path, dim_from_weights=True)
    network = build_network(ToyTransformer(1), options, mode="audio", seed=1)
    assert {path.split(".")[2] for path, _ in network.adapters()} == {"audio_attn1", "audio_attn2"}


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_loftq_start_values_are_added_as_they_are(alpha):
    model = ToyTransformer(1)
    path = "transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(3, 12), torch.randn(12, 3)
    options = NetworkOptions(dim=4, alpha=alpha)
    network = build_network(model, options, mode="video", seed=1, start_values={path: (down, up), "other": (down, up)})
    adapters = dict(network.adapters())
    torch.testing.assert_close(adapters[path].delta(), up @ down, rtol=1e-5, atol=1e-5)
    assert not adapters["transformer_blocks.0.attn1.to_k"].lora_up.weight.any()
    with pytest.raises(UserError, match="none of the start values"):
        network.start_from({"other": (down, up)})
    with pytest.raises(UserError, match="rank 5, not 4"):
        network.start_from({path: (torch.zeros(5, 12), torch.zeros(12, 5))})


def test_network_weights_win_over_loftq(tmp_path, caplog):
    trained = build_network(ToyTransformer(1), NetworkOptions(dim=2, alpha=2.0), mode="video", seed=1)
    path = tmp_path / "x.safetensors"
    save_comfy(path, trained.matrices(), {})
    start = {"transformer_blocks.0.attn1.to_q": (torch.ones(2, 12), torch.ones(12, 2))}
    options = NetworkOptions(dim=2, alpha=2.0, weights=path)
    network = build_network(ToyTransformer(1), options, mode="video", seed=1, start_values=start)
    assert "wins over --loftq_init" in caplog.text
    assert not any(adapter.lora_up.weight.any() for _, adapter in network.adapters())


def test_target_of_needs_no_model():
    options = NetworkOptions(preset="v2v", args={"exclude_patterns": "['.*to_k']", "include_patterns": "['.*to_q']"})
    adapted = target_of(options, "video")
    assert adapted("transformer_blocks.3.attn1.to_q") and not adapted("transformer_blocks.3.ff.net.2")
    assert not adapted("transformer_blocks.3.audio_attn1.to_q")


def test_full_tells_about_gates(caplog):
    build_network(ToyTransformer(1, gates=True), NetworkOptions(dim=1, preset="full"), mode="av", seed=0)
    assert "6 gate projections" in caplog.text


def test_no_sound_layer_is_told(caplog):
    options = NetworkOptions(dim=1, args={"include_patterns": r"['.*\.attn1\.to_q']"})
    build_network(ToyTransformer(1), options, mode="av", seed=0)
    assert "sound will not be learned" in caplog.text


def test_any_module_of_the_protocol(monkeypatch):
    created = {}

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def apply_to(self, text_encoders, unet, apply_text_encoder, apply_unet):
            created["applied"] = (unet, apply_text_encoder, apply_unet)

        def prepare_optimizer_params(self, unet_lr=None):
            return [{"params": self.parameters(), "lr": unet_lr}]

    def create_network(multiplier, dim, alpha, vae, text_encoders, unet, **kwargs):
        created["arguments"] = (multiplier, dim, alpha, vae, text_encoders, kwargs)
        return Network()

    monkeypatch.setitem(sys.modules, "my_network", types.SimpleNamespace(create_network=create_network))
    model = ToyTransformer(1)
    options = NetworkOptions(module="my_network", dim=4, alpha=2.0, args={"x": "1"})
    network = build_network(model, options, mode="av", seed=0)
    assert created["arguments"] == (1.0, 4, 2.0, None, None, {"x": "1"}) and created["applied"] == (model, False, True)
    groups, names = optimizer_groups(network, 1e-3)
    assert names == ["unet"] and groups[0]["lr"] == 1e-3 and len(groups[0]["params"]) == 1
    with pytest.raises(UserError, match="--audio_lr is for the built-in LoRA only"):
        optimizer_groups(network, 1e-3, 1e-4)
    with pytest.raises(UserError, match="--lr_args is for the built-in LoRA only"):
        optimizer_groups(network, 1e-3, None, (("a", 1.0),))


@pytest.mark.parametrize(("module", "remedy"), [("lycoris_gone.kohya", "pip install"), ("nothing_here", "spelling")])
def test_missing_modules(module, remedy):
    with pytest.raises(UserError, match=remedy):
        build_network(ToyTransformer(1), NetworkOptions(module=module), mode="av", seed=0)
