"""networks.lora_ltx2: the kohya protocol, its arguments and the learning-rate groups."""

from __future__ import annotations

import logging

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.groups import LearningRates, parse_lr_args
from networks import lora_ltx2
from tests.lora.toy import ToyTransformer, randomise


def make(model=None, **kwargs):
    return lora_ltx2.create_network(1.0, 4, None, None, None, model or ToyTransformer(1), **kwargs)


def test_create_apply_save_and_load(tmp_path):
    model = ToyTransformer(1)
    network = make(model)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    randomise(network)
    path = tmp_path / "x.safetensors"
    network.save_weights(path, torch.float32, {"ss_network_dim": "4"})
    other = make(ToyTransformer(1))
    assert "24 modules" in other.load_weights(path) and "original" in other.load_weights(path)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values()))
    from_file = lora_ltx2.create_network_from_weights(0.5, path, None, None, ToyTransformer(1))
    assert from_file.multiplier == 0.5 and from_file.parameter_count == network.parameter_count


def test_patterns_and_dropouts_reach_the_network():
    network = make(
        include_patterns=r"[r'.*\.attn1\.to_q', '.*to_k']",
        exclude_patterns="['.*audio.*']",
        rank_dropout="0.1",
        module_dropout="0.2",
        neuron_dropout=0.3,
        conv_dim="8",
        verbose="True",
    )
    adapters = dict(network.adapters())
    assert "transformer_blocks.0.attn1.to_q" in adapters and len(adapters) == 7
    adapter = adapters["transformer_blocks.0.attn1.to_q"]
    assert (adapter.dropout, adapter.rank_dropout, adapter.module_dropout) == (0.3, 0.1, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"includ_patterns": "[]"}, "did you mean 'include_patterns'.*known are"),
        ({"include_patterns": "__import__('os').getcwd()"}, "expected a list"),
        ({"include_patterns": "'.*'"}, "expected a list"),
        ({"exclude_patterns": "[1]"}, "expected a list"),
        ({"rank_dropout": "1.0"}, "from 0 up to, not including, 1"),
        ({"module_dropout": "x"}, "from 0 up to"),
        ({"loraplus_lr_ratio": "-1"}, "at least 0"),
        ({"verbose": "maybe"}, "true or false"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)


def test_the_guides_example_of_learning_rates():
    rates = LearningRates(1e-4, 1e-5, parse_lr_args(["audio_attn=1e-6", "video_to_audio=5e-6"]))
    prefix = "lora_unet_model_transformer_blocks_0_"
    assert rates.of(prefix + "audio_attn1_to_q")[0] == 1e-6
    assert rates.of(prefix + "video_to_audio_attn_to_q")[0] == 5e-6
    assert rates.of(prefix + "audio_to_video_attn_to_q")[0] == 1e-5
    assert rates.of(prefix + "audio_ff_net_2")[0] == 1e-5
    assert rates.of(prefix + "attn1_to_q")[0] == 1e-4


def test_equal_matches_go_to_the_first_typed():
    assert LearningRates(1.0, None, (("attn1", 2.0), ("to_q_", 3.0), ("attn", 4.0))).of("x_attn1_to_q_")[0] == 2.0


def test_one_group_without_options():
    groups, names = make().prepare_optimizer_params(1e-4)
    assert names == ["unet"] and [group["lr"] for group in groups] == [1e-4] and len(groups[0]["params"]) == 48


def test_loraplus_has_its_own_group():
    groups, names = make(loraplus_lr_ratio="16").prepare_optimizer_params(1e-4)
    assert names == ["unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1.6e-3])
    assert all(parameter.shape[0] == 4 for parameter in groups[0]["params"])


def test_groups_are_named_and_rate_zero_freezes():
    network = make(preset="v2v")
    groups, names = network.prepare_optimizer_params(
        1e-4, audio_lr=1e-5, lr_args=parse_lr_args([r"_ff_net=0", "video_to_audio=5e-6"])
    )
    assert names == ["unet_video", "unet_audio", "unet_video_to_audio"]
    assert [len(group["params"]) for group in groups] == [16, 24, 8]
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 8 and all("_ff_net" in name for name in frozen)


def test_groups_of_equal_rate_are_merged():
    groups, names = make().prepare_optimizer_params(1e-4, audio_lr=1e-4)
    assert len(groups) == 1 and names == ["unet_video+unet_audio"]


def test_a_pattern_without_a_module_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        make().prepare_optimizer_params(1e-4, lr_args=(("audio_atn", 1e-5),))
    assert "audio_atn matches no adapter" in caplog.text and "audio_attn" in caplog.text


@pytest.mark.parametrize("token", ["audio", "=1e-4", "audio=", "audio=x", "audio=-1", "(=1e-4", "audio=nan"])
def test_malformed_lr_args(token):
    with pytest.raises(UserError, match=r"--lr_args"):
        parse_lr_args([token])
