"""The network group: defaults, conversion, and every mistake in one go."""

from __future__ import annotations

import logging

import pytest

from ltx2_tuner.cli import arguments_network
from ltx2_tuner.cli.parser import Parser


def read(*argv: str, mode: str = "av"):
    parser = Parser("test", "test")
    arguments_network.add_arguments(parser)
    errors: list[str] = []
    options = arguments_network.network_options(parser.parse_args(list(argv)), mode, errors)
    return options, errors


def test_defaults_are_said_once(caplog):
    with caplog.at_level(logging.INFO):
        options, errors = read()
    assert not errors and (options.dim, options.alpha, options.preset) == (32, 32.0, "t2v")
    assert "rank 32" in caplog.text and "scale 1" in caplog.text


@pytest.mark.parametrize(
    ("argv", "mode", "preset"),
    [
        ((), "audio", "audio"),
        (("--lora_target_preset", "v2v"), "audio", "v2v"),
        (("--ic_lora_strategy", "v2v"), "video", "v2v"),
        (("--lora_target_preset", "audio_ref_ic"), "av", "audio_ref_only_ic"),
        (("--ic_lora_strategy", "audio_ref_ic"), "av", "audio_ref_only_ic"),
    ],
)
def test_preset(argv, mode, preset):
    options, errors = read(*argv, mode=mode)
    assert not errors and options.preset == preset


def test_alpha_unlike_the_rank_is_told(caplog):
    options, _ = read("--network_dim", "16", "--network_alpha", "8")
    assert options.alpha == 8.0 and "effective scale is 0.5" in caplog.text


def test_alpha_zero_means_the_rank():
    assert read("--network_dim", "16", "--network_alpha", "0")[0].alpha == 16.0


def test_network_args_keep_commas_and_equals():
    patterns = r"include_patterns=['.*\.to_k$','(?=x).*']"
    options, errors = read("--network_args", patterns, "loraplus_lr_ratio=4")
    assert not errors
    assert options.args == {"include_patterns": r"['.*\.to_k$','(?=x).*']", "loraplus_lr_ratio": "4"}


def test_a_key_given_twice_keeps_the_last(caplog):
    options, _ = read("--network_args", "rank_dropout=0.1", "rank_dropout=0.2")
    assert options.args == {"rank_dropout": "0.2"} and "given twice" in caplog.text


def test_base_weights_without_multipliers_are_whole(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.touch()
    argv = ["--base_weights", *map(str, files), "--base_weights_multiplier", "0.5"]
    options, errors = read(*argv)
    assert not errors and options.base_weights == ((files[0], 0.5), (files[1], 1.0))


@pytest.mark.parametrize(
    ("argv", "mode", "message"),
    [
        (("--network_dim", "0"), "av", "--network_dim 0"),
        (("--network_alpha", "-1"), "av", "--network_alpha -1"),
        (("--network_dropout", "1"), "av", "--network_dropout 1"),
        (("--scale_weight_norms", "0"), "av", "--scale_weight_norms 0"),
        (("--dim_from_weights",), "av", "--dim_from_weights needs --network_weights"),
        (("--network_weights", "gone.safetensors"), "av", "--network_weights gone.safetensors: no such file"),
        (("--network_args", "rank"), "av", "--network_args rank: expected key=value"),
        (("--network_args", "rank_drop=0.1"), "av", "did you mean 'rank_dropout'"),
        (("--network_module", "networks.nothing"), "av", "--network_module networks.nothing: no such module"),
        (("--network_module", "lycoris_x.kohya"), "av", "pip install lycoris-lora"),
        (("--init_lokr_norm", "1e-3"), "av", "--init_lokr_norm needs --network_module lycoris.kohya"),
        (("--ic_lora_strategy", "v2v"), "av", "v2v training is video-only"),
        (("--ic_lora_strategy", "audio_ref_only_ic"), "video", "needs sound"),
        (("--base_weights_multiplier", "1", "2"), "av", "has 2 values for 0 --base_weights"),
    ],
)
def test_one_sentence_a_mistake(argv, mode, message):
    _, errors = read(*argv, mode=mode)
    assert len(errors) == 1 and message in errors[0]


def test_all_mistakes_together():
    _, errors = read("--network_dim", "0", "--network_dropout", "2", "--dim_from_weights", "--lycoris_config", "x.toml")
    assert len(errors) == 5


def test_unknown_preset_is_an_argument_error(capsys):
    with pytest.raises(SystemExit) as exit_info:
        read("--lora_target_preset", "t2w")
    assert exit_info.value.code == 2 and "t2v" in capsys.readouterr().err
