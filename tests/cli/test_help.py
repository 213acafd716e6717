"""What every script says about its flags: --help, the pages under docs/flags, and answers to mistyped flags."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_tuner.cli.flag_reference import DOCS, page, parser_of
from ltx2_tuner.cli.ltx2_train_network import main as train
from ltx2_tuner.cli.parser import COUNTERPARTS, SCRIPTS, Parser, entry_point

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=environment)


def answer(capsys: pytest.CaptureFixture, parser: Parser, *argv: str) -> str:
    """What a parser prints about arguments that it refuses."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_script_in_the_root_is_known():
    wrappers = {path.stem for path in ROOT.glob("*.py")}
    assert wrappers == set(SCRIPTS)
    assert {path.stem for path in DOCS.glob("*.md")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag(script, capsys):
    main = importlib.import_module(f"ltx2_tuner.cli.{script}").main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    hidden = {
        flag for action in parser_of(script)._actions if action.help == "==SUPPRESS==" for flag in action.option_strings
    }
    for flag in set(parser_of(script).flags()) - hidden:
        assert re.search(rf"{flag}\b", text), flag
    assert text.startswith(f"usage: {script}.py") and "None" not in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_text(script):
    assert not [action.option_strings for action in parser_of(script)._actions if not action.help]


@pytest.mark.parametrize("script", SCRIPTS)
def test_pages_are_those_of_the_parsers(script):
    """The frozen snapshot of all flags, defaults and texts."""
    committed = (DOCS / f"{script}.md").read_text(encoding="utf-8")
    assert committed == page(parser_of(script)), "run python -m ltx2_tuner.cli.flag_reference and commit docs/flags"


@pytest.mark.parametrize("script", ["ltx2_quantize_model", "ltx2_train_network"])
def test_scripts_and_modules_both_start(script):
    for command in ((f"{script}.py",), ("-m", f"ltx2_tuner.cli.{script}")):
        done = run(*command, "--version")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("ltx2-tuner 0.")


def test_every_module_starts_its_main():
    for script in SCRIPTS:
        source = Path(importlib.import_module(f"ltx2_tuner.cli.{script}").__file__).read_text(encoding="utf-8")
        assert re.search(r'\nif __name__ == "__main__":\n    .*\(main\(\)\)\n$', source), script


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_flag_names_the_nearest(script, capsys):
    parser = parser_of(script)
    flag = next(action.option_strings[0] for action in parser._actions if len(action.option_strings[0]) > 8)
    required = [
        token
        for action in parser._actions
        if action.required
        for token in (*action.option_strings[:1], next(iter(action.choices or "x")))
    ]
    error = answer(capsys, parser, *required, flag[:-1] + "qq")
    assert f"unknown flag {flag[:-1]}qq (did you mean {flag}?)" in error
    assert error.count("\n") == 1, "one line, without the usage"


def test_a_flag_of_another_script_names_that_script(capsys):
    assert "unknown flag --skip_existing: it belongs to ltx2_cache_latents.py" in answer(
        capsys, parser_of("ltx2_train_network"), "--skip_existing"
    )
    assert "--max_train_steps: it belongs to ltx2_train_network.py" in answer(
        capsys, parser_of("ltx2_cache_latents"), "--dataset_config", "x", "--max_train_steps=3"
    )


@pytest.mark.parametrize("flag", ["--rank", "--lora_alpha", "--train_steps", "--caption_dropout_p", "--t5"])
def test_a_flag_of_another_tool_names_its_counterpart(flag, capsys):
    assert f"unknown flag {flag}: here it is {COUNTERPARTS[flag]}" in answer(
        capsys, parser_of("ltx2_train_network"), flag, "1"
    )


def test_counterparts_exist():
    flags = {flag for script in SCRIPTS for flag in parser_of(script).flags()}
    assert {answer.split()[0] for answer in COUNTERPARTS.values()} <= flags


def test_flags_are_never_abbreviated(capsys):
    assert "unknown flag --max_train_step " in answer(capsys, parser_of("ltx2_train_network"), "--max_train_step", "3")


def test_several_mistakes_and_stray_words_are_all_named(capsys):
    parser = parser_of("ltx2_train_network")
    error = answer(capsys, parser, "--sed", "1", "--max_train_stepz", "2")
    assert "--seed" in error and "--max_train_steps" in error
    assert "unexpected argument: data.toml" in answer(capsys, parser, "data.toml")


def test_values_that_are_none_are_named(capsys):
    parser = parser_of("ltx2_train_network")
    assert "'sound' is no mode; use video (v), av (va) or audio (a)" in answer(capsys, parser, "--ltx2_mode", "sound")
    assert "'bf61' is no dtype" in answer(capsys, parser, "--dit_dtype", "bf61")


def test_dataset_keys_name_the_nearest(tmp_path, capsys):
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        "[general]\nresolutoin = [64, 64]\nbatch_size = 'two'\n"
        "[[datasets]]\nvideo_directroy = 'clips'\ncache_directory = 'cache'\ntarget_frame = [17]\n"
        "frame_extraction = 'heads'\n",
        encoding="utf-8",
    )
    arguments = ("--dataset_config", str(dataset), "--ltx2_checkpoint", "x", "--output_dir", str(tmp_path / "out"))
    assert train([*arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert str(dataset) in error and "Traceback" not in error
    for part in ("'resolution'", "batch_size", "'video_directory'", "'target_frames'", "frame_extraction", "general:"):
        assert part in error, part


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PermissionError(13, "Permission denied", "out/x"), "error: out/x: no permission"),
        (NotADirectoryError(20, "Not a directory", "out/x"), "error: out/x: a file stands where a folder is needed"),
        (FileNotFoundError(2, "No such file", "out/x"), "error: out/x: no such file or folder"),
    ],
)
def test_refusals_of_the_system_are_one_sentence(raised, said, capsys):
    @entry_point
    def main(argv):
        raise raised

    assert main([]) == 1
    assert capsys.readouterr().err.startswith(said)


def test_bugs_keep_their_traceback():
    @entry_point
    def main(argv):
        raise OSError("no file is to blame")

    with pytest.raises(OSError, match="no file is to blame"):
        main([])


def test_ctrl_c_is_status_130(capsys):
    @entry_point
    def main(argv):
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_allocator_grows_its_segments_unless_told_otherwise(monkeypatch):
    seen = []

    @entry_point
    def main(argv):
        seen.append((os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF")))

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    main([])
    assert seen.pop() == ("expandable_segments:True",) * 2
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    main([])
    assert seen.pop() == (None, "max_split_size_mb:64")
