"""LyCORIS settings; the networks themselves where the package is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.build import build_network, optimizer_groups
from ltx2_tuner.lora.formats import any_to_comfy
from ltx2_tuner.lora.lycoris import read_settings
from ltx2_tuner.lora.options import LYCORIS, NetworkOptions
from tests.lora.toy import VIDEO, ToyTransformer

GUIDE = """
[network]
base_algo = "lokr"
base_factor = 16

[network.modules."*audio*"]
algo = "lora"
dim = 64
alpha = 32

[network.init]
lokr_norm = 1e-3
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def options(tmp_path: Path | None = None, toml: str | None = None, **args) -> NetworkOptions:
    config = write(tmp_path / "my lycoris.toml", toml) if toml else None
    known = {key: args.pop(key) for key in ("init_lokr_norm", "dropout", "dim", "alpha") if key in args}
    return NetworkOptions(module=LYCORIS, lycoris_config=config, args=args, **{"dim": 4, "alpha": 4.0, **known})


def test_the_guides_toml(tmp_path):
    settings = read_settings(options(tmp_path, GUIDE))
    assert settings.arguments == {"algo": "lokr", "factor": 16}
    assert settings.modules == {"*audio*": {"algo": "lora", "dim": 64, "alpha": 32}}
    assert settings.lokr_norm == 1e-3 and settings.algorithms == {"lokr", "lora"}


def test_network_args_override_the_toml(tmp_path):
    args = {"factor": "8", "modules.*audio*.dim": "16", "modules.*ff*.algo": "loha", "init.lokr_norm": "0.5"}
    settings = read_settings(options(tmp_path, GUIDE, **args))
    assert settings.arguments["factor"] == "8" and settings.lokr_norm == 0.5
    assert settings.modules["*audio*"] == {"algo": "lora", "dim": 16, "alpha": 32}
    assert settings.modules["*ff*"] == {"algo": "loha"}


@pytest.mark.parametrize(
    ("toml", "args", "message"),
    [
        ("[other]\nx = 1", {}, r"no \[network\] table"),
        ("[network", {}, "cannot be read as TOML"),
        ('[network]\nbase_alg = "lora"', {}, "did you mean 'base_algo'"),
        ('[network]\nbase_algo = "lokar"', {}, "did you mean 'lokr'"),
        ("[network]\nbase_factor = 0", {}, "factor = 0 has to be above 0"),
        ('[network.modules."*ff*"]\ndim = -1', {}, "dim = -1 has to be above 0"),
        ("[network]\nmodules = 3", {}, "have to be tables"),
        (None, {"algo": "lora", "init_lokr_norm": 0.1}, "is for LoKr only"),
        (None, {"init.lokr_nrm": "1"}, "unknown key"),
    ],
)
def test_mistakes(tmp_path, toml, args, message):
    with pytest.raises(UserError, match=message):
        read_settings(options(tmp_path, toml, **args))


@pytest.fixture
def kohya():
    return pytest.importorskip("lycoris.kohya")


@pytest.mark.parametrize("algo", ["lora", "locon", "loha", "lokr"])
def test_algorithms_train_and_save(kohya, tmp_path, algo):
    model = ToyTransformer(1).requires_grad_(False)
    before = list(kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE)
    network = build_network(model, options(algo=algo, factor="2"), mode="av", seed=0)
    assert before == kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE
    assert len(network.unet_loras) == 28
    groups, names = optimizer_groups(network, 1e-3)
    model.get_submodule("transformer_blocks.0.attn1.to_q")(torch.randn(2, VIDEO)).sum().backward()
    assert names == ["unet"] and any(parameter.grad is not None for parameter in groups[0]["params"])
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    comfy = any_to_comfy(network.state_dict())
    assert all(key.startswith("diffusion_model.transformer_blocks.0.") for key in comfy)
    with pytest.raises(UserError, match="built-in LoRA only"):
        optimizer_groups(network, 1e-3, 1e-4)


def test_patterns_modes_and_gates(kohya, tmp_path):
    network = build_network(ToyTransformer(1), options(tmp_path, GUIDE), mode="av", seed=0)
    kinds = {adapter.lora_name: type(adapter).__name__ for adapter in network.unet_loras}
    assert kinds["lora_unet_transformer_blocks_0_audio_attn1_to_q"] == "LoConModule"
    assert kinds["lora_unet_transformer_blocks_0_attn1_to_q"] == "LokrModule"
    video = build_network(ToyTransformer(1), options(algo="lora"), mode="video", seed=0)
    assert len(video.unet_loras) == 10 and not any("audio" in a.lora_name for a in video.unet_loras)
    gated = build_network(ToyTransformer(1), options(**{"modules.*to_gate_logits.dim": "1"}), mode="video", seed=0)
    assert len(gated.unet_loras) == 12


def test_class_names_give_settings(kohya):
    args = {"algo": "lokr", "factor": "2", "modules.FeedForward.algo": "lora"}
    network = build_network(ToyTransformer(1), options(**args), mode="video", seed=0)
    kinds = {a.lora_name.split("_0_", 1)[1]: type(a).__name__ for a in network.unet_loras}
    assert kinds["ff_net_2"] == "LoConModule" and kinds["attn1_to_q"] == "LokrModule"


def test_lokr_start_scale(kohya):
    model = ToyTransformer(1)
    args = options(algo="lokr", factor="2", init_lokr_norm=1e-2, dim=10_000, alpha=1.0)
    network = build_network(model, args, mode="video", seed=0)
    weight = model.get_submodule("transformer_blocks.0.ff.net.2").weight
    adapter = next(a for a in network.unet_loras if a.lora_name.endswith("_ff_net_2"))
    assert torch.equal(adapter.lokr_w1, torch.ones_like(adapter.lokr_w1))
    assert adapter.lokr_w2.std().item() == pytest.approx(0.01 * weight.std().item(), rel=0.2)


def test_quantised_bases_bypass_or_refuse(kohya, caplog):
    network = build_network(ToyTransformer(1), options(algo="lora"), mode="video", seed=0, quantised=True)
    assert all(adapter.bypass_mode for adapter in network.unet_loras) and "less tested" in caplog.text
    for args in ({"algo": "full"}, {"algo": "lora", "dora_wd": "True"}):
        with pytest.raises(UserError, match="rebuilds weights"):
            build_network(ToyTransformer(1), options(**args), mode="video", seed=0, quantised=True)
