"""Adapters on a transformer: start values, switching, loading, norms."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora import Dropouts, LoRALinear, LoRANetwork, Targets, save_comfy, save_original, select_layers
from ltx2_tuner.lora.files import load_lora
from ltx2_tuner.lora.formats import parse, to_original
from tests.lora.toy import AUDIO, VIDEO, ToyTransformer, randomise

Q = "transformer_blocks.0.attn1.to_q"


def make(model, mode="av", preset="t2v", rank=4, alpha=None, **kwargs) -> LoRANetwork:
    return LoRANetwork(select_layers(model, Targets(mode, preset)), rank, alpha, **kwargs)


def test_starts_as_nothing_with_kaiming_down():
    model = ToyTransformer(1)
    network = make(model, rank=64)
    for _, adapter in network.adapters():
        bound = 1 / math.sqrt(adapter.in_features)
        down = adapter.lora_down.weight
        assert not adapter.lora_up.weight.any()
        assert down.abs().max() <= bound and down.abs().max() > 0.95 * bound
        assert abs(down.mean().item()) < 0.1 * bound


def test_start_values_depend_on_seed_and_name_only():
    model = ToyTransformer(2)
    torch.manual_seed(5)
    all_layers = dict(make(model, preset="full", seed=3).adapters())
    torch.manual_seed(6)
    some = dict(make(model, "video", seed=3).adapters())
    other = dict(make(model, "video", seed=4).adapters())
    for path, adapter in some.items():
        assert torch.equal(adapter.lora_down.weight, all_layers[path].lora_down.weight)
        assert not torch.equal(adapter.lora_down.weight, other[path].lora_down.weight)
    first, second = some[Q], some["transformer_blocks.1.attn1.to_q"]
    assert not torch.equal(first.lora_down.weight, second.lora_down.weight)


def test_creation_leaves_torchs_generator_alone():
    model = ToyTransformer(1)
    before = torch.get_rng_state()
    make(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_attach_and_detach_give_the_layers_back():
    model = ToyTransformer(1)
    before = dict(model.named_modules())
    network = make(model).attach(model)
    assert isinstance(model.get_submodule(Q), LoRALinear)
    with pytest.raises(RuntimeError, match="attached already"):
        network.attach(model)
    network.detach()
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)


def test_two_networks_add_up_and_come_off_in_order():
    model = ToyTransformer(1)
    x = torch.randn(3, VIDEO)
    plain = model.get_submodule(Q)(x)
    first, second = make(model), make(model, rank=2)
    randomise(first, 1), randomise(second, 2)
    first.attach(model), second.attach(model)
    deltas = [dict(network.adapters())[Q].delta() for network in (first, second)]
    torch.testing.assert_close(model.get_submodule(Q)(x), plain + x @ sum(deltas).T, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="attached after"):
        first.detach()
    second.detach(), first.detach()
    assert torch.equal(model.get_submodule(Q)(x), plain)


def test_switching_and_multiplier():
    model = ToyTransformer(1)
    network = make(model)
    randomise(network)
    network.attach(model)
    x = torch.randn(3, VIDEO)
    layer = model.get_submodule(Q)
    plain, delta = layer.base(x), x @ dict(network.adapters())[Q].delta().T
    network.set_multiplier(-2.0)
    torch.testing.assert_close(layer(x), plain - 2 * delta, rtol=1e-5, atol=1e-4)
    with pytest.raises(ZeroDivisionError), network.disabled():
        assert torch.equal(layer(x), plain)
        raise ZeroDivisionError
    torch.testing.assert_close(layer(x), plain - 2 * delta, rtol=1e-5, atol=1e-4)


def test_state_dict_is_the_kohya_form_and_loads_alpha():
    model = ToyTransformer(1)
    network = make(model, rank=4, alpha=2.0)
    randomise(network)
    state = network.state_dict()
    assert parse(state).modules.keys() == {path for path, _ in network.adapters()}
    assert state["lora_unet_model_transformer_blocks_0_attn1_to_q.alpha"].item() == 2.0
    other = make(model, rank=4, alpha=4.0)
    other.load_state_dict(state)
    assert dict(other.adapters())[Q].scale == 0.5
    torch.testing.assert_close(dict(other.adapters())[Q].delta(), dict(network.adapters())[Q].delta())


def test_a_state_in_bfloat16_keeps_the_exact_alpha():
    network = make(ToyTransformer(1), alpha=2.7).to(torch.bfloat16)
    network.load_state_dict(network.state_dict())
    assert dict(network.adapters())[Q].alpha_value == 2.7


@pytest.mark.parametrize("save", [save_original, save_comfy])
def test_warm_start_keeps_the_strength_of_the_file(tmp_path, save):
    model = ToyTransformer(1)
    trained = make(model, rank=4, alpha=3.0)
    randomise(trained)
    save(tmp_path / "x.safetensors", trained.matrices(), {})
    network = make(model, rank=4, alpha=8.0)
    network.load(load_lora(tmp_path / "x.safetensors"))
    wanted = dict(trained.adapters())
    for path, adapter in network.adapters():
        torch.testing.assert_close(adapter.delta(), wanted[path].delta(), rtol=1e-5, atol=1e-5)


def test_from_file_takes_ranks_and_alphas(tmp_path):
    model = ToyTransformer(2)
    layers = select_layers(model, Targets("av", "t2v"))
    ranks = {path: 1 + index % 3 for index, path in enumerate(layers)}
    trained = LoRANetwork(layers, ranks, 2.0)
    randomise(trained)
    save_original(tmp_path / "x.safetensors", trained.matrices(), {})
    network = LoRANetwork.from_file(model, load_lora(tmp_path / "x.safetensors"), multiplier=0.5)
    found = dict(network.adapters())
    assert {path: adapter.rank for path, adapter in found.items()} == ranks
    for path, adapter in trained.adapters():
        assert torch.equal(found[path].delta(), adapter.delta()) and found[path].multiplier == 0.5


def test_other_ranks_are_refused_with_the_remedy():
    model = ToyTransformer(1)
    lora = parse(to_original(make(model, rank=8).matrices()), source="r8.safetensors")
    with pytest.raises(UserError, match=r"r8\.safetensors.*network's 4.*: 8.*--dim_from_weights"):
        make(model, rank=4).load(lora)


def test_missing_sound_starts_fresh_with_a_warning(caplog):
    model = ToyTransformer(1)
    video = make(model, "video")
    randomise(video)
    network = make(model, "av")
    with caplog.at_level(logging.WARNING):
        network.load(parse(to_original(video.matrices()), source="video.safetensors"))
    assert "start fresh" in caplog.text
    found = dict(network.adapters())
    assert found[Q].lora_up.weight.any() and not found["transformer_blocks.0.audio_attn1.to_q"].lora_up.weight.any()


def test_surplus_sound_is_ignored_with_a_warning(caplog):
    model = ToyTransformer(1)
    av = make(model, "av")
    randomise(av)
    network = make(model, "video")
    with caplog.at_level(logging.WARNING):
        network.load(parse(to_original(av.matrices()), source="av.safetensors"))
    assert "ignored" in caplog.text and dict(network.adapters())[Q].lora_up.weight.any()


def test_missing_picture_modules_are_an_error():
    model = ToyTransformer(1)
    lora = parse(to_original(make(model, preset="t2v").matrices()), source="t2v.safetensors")
    with pytest.raises(UserError, match=r"t2v\.safetensors: it lacks modules.*ff\.net"):
        make(model, preset="v2v").load(lora)


def test_sizes_of_another_model_are_refused():
    model = ToyTransformer(1)
    matrices = make(model).matrices()
    lora = parse(to_original(matrices))
    wrong = dict.fromkeys(lora.modules, matrices["transformer_blocks.0.audio_attn1.to_q"])
    with pytest.raises(UserError, match=f"{AUDIO}x{AUDIO}, the model's is {VIDEO}x{VIDEO}"):
        LoRANetwork.from_file(model, parse(to_original(wrong)))


def test_nothing_in_common_is_refused():
    lora = parse(to_original(make(ToyTransformer(1)).matrices()), source="other.safetensors")
    with pytest.raises(UserError, match="none of its 24 modules"):
        LoRANetwork.from_file(torch.nn.Sequential(torch.nn.Linear(2, 2)), lora)


def test_scale_weight_norms_shrinks_only_what_exceeds():
    model = ToyTransformer(1)
    network = make(model, rank=4, alpha=2.0)
    randomise(network)
    norms = {path: adapter.delta().norm().item() for path, adapter in network.adapters()}
    limit = sorted(norms.values())[len(norms) // 2]
    found = network.scale_weight_norms(limit)
    assert found["keys_scaled"].item() == sum(norm > limit * (1 + 1e-6) for norm in norms.values())
    for path, adapter in network.adapters():
        assert adapter.delta().norm().item() == pytest.approx(min(norms[path], limit), rel=1e-4)
    assert found["max_key_norm"].item() == pytest.approx(limit, rel=1e-4)


def test_has_dropout():
    model = ToyTransformer(1)
    assert not make(model).has_dropout
    assert make(model, dropouts=Dropouts(rank=0.1)).has_dropout
