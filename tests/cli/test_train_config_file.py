"""--config_file: checked like the command line, which wins over it."""

from __future__ import annotations

import pytest

from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.errors import UserError


def parse(tmp_path, text: str, *arguments: str):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return parse_with_config(build_parser(), ["--config_file", str(path), *arguments])


def test_sections_have_no_meaning_and_the_command_line_wins(tmp_path):
    text = """
    max_train_steps = 10
    [network]
    network_dim = 8
    network_args = ["rank_dropout=0.1", "verbose=true"]
    [speed]
    gradient_checkpointing = true
    sample_audio_subprocess = false
    learning_rate = "1e-4"
    ltx_mode = "av"
    save_state = true
    autoresume = false
    optimizer_args = "weight_decay=0.1"
    """
    args = parse(tmp_path, text, "--network_dim", "16")
    assert (args.max_train_steps, args.network_dim, args.learning_rate) == (10, 16, 1e-4)
    assert args.network_args == ["rank_dropout=0.1", "verbose=true"]
    assert args.optimizer_args == ["weight_decay=0.1"]
    assert args.gradient_checkpointing is True and args.sample_audio_subprocess is False
    assert args.ltx2_mode == "av" and args.save_state and not args.autoresume


def test_the_suffix_may_be_left_out(tmp_path):
    (tmp_path / "run.toml").write_text("seed = 3", encoding="utf-8")
    assert parse_with_config(build_parser(), ["--config_file", str(tmp_path / "run")]).seed == 3


def test_negative_and_quoted_values(tmp_path):
    args = parse(tmp_path, 'shifted_logit_shift = -0.5\ntraining_comment = "--a \\"b\\""')
    assert args.shifted_logit_shift == -0.5 and args.training_comment == '--a "b"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("netwrk_dim = 4", "unknown key netwrk_dim .did you mean 'network_dim'"),
        ("seed = 1\n[a]\nseed = 2", "seed stands in two sections"),
        ("[a.b]\nseed = 2", "a table inside a table"),
        ("seed = [1, 2]", "seed is a list"),
        ("save_state = 1", "save_state is a switch"),
        ("seed = true", "--seed takes a value"),
        ("config_file = 'x'", "no place in a config file"),
        ("seed = ", "no valid TOML"),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected) as error:
        parse(tmp_path, text)
    assert "run.toml" in str(error.value)


@pytest.mark.parametrize("text", ["seed = 1.5", "loss_type = 'none'", "ltx2_mode = 'sound'"])
def test_types_and_choices_are_checked(tmp_path, text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, text)
    assert stop.value.code == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        parse_with_config(build_parser(), ["--config_file", str(tmp_path / "x")])
