"""ltx2_train_slider.py from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ltx2_tuner.cli.ltx2_train_slider import build_parser, join_ranges, main
from tests.training.sliders import text_slider, write_pairs
from tests.training.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def errors_of(capsys, arguments) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


def test_a_text_slider_with_previews_at_every_multiplier(tmp_path, checkpoint):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox --w 64 --h 64 --f 1 --s 2 --d 1\n", encoding="utf-8")
    arguments, _ = text_slider(
        tmp_path,
        checkpoint,
        *("--sample_prompts", prompts, "--sample_every_n_steps", 4, "--vae_dtype", "float32"),
        *("--sample_slider_range", "-2,0,1.5", "--logging_dir", tmp_path / "logs"),
    )
    command = [sys.executable, str(ROOT / "ltx2_train_slider.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", env=os.environ)
    assert done.returncode == 0, done.stderr
    samples = sorted(path.name for path in (tmp_path / "output" / "sample").iterdir())
    assert [name.split("_000004_00_")[0] for name in samples] == ["tiny_mult+0.0", "tiny_mult+1.5", "tiny_mult-2.0"]
    with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_slider_mode"] == "text" and metadata["ss_slider_guidance_strength"] == "1.0"
    assert '"positive": "a red fox, sharp"' in metadata["ss_slider_targets"]
    assert "ss_ic_lora_strategy" not in metadata
    (folder,) = (tmp_path / "logs").glob("*/network_train")
    shown = EventAccumulator(str(folder)).Reload().Tags()["images"]
    assert sorted(shown) == ["sample_0_mult+0.0", "sample_0_mult+1.5", "sample_0_mult-2.0"], "one a multiplier"
    assert (tmp_path / "output" / "tiny.comfy.safetensors").is_file()


def test_a_reference_slider_resumes_bit_for_bit(tmp_path, checkpoint):
    flags = ("--save_state", "--save_every_n_steps", 3, "--gradient_accumulation_steps", 2, "--max_train_steps", 6)
    arguments, _ = write_pairs(tmp_path, checkpoint, *flags)
    assert main(arguments) == 0
    state = tmp_path / "output" / "tiny-step00000003-state"
    assert main([*arguments, "--output_dir", str(tmp_path / "rest"), "--resume", str(state)]) == 0
    whole, rest = (load_file(tmp_path / name / "tiny.safetensors") for name in ("output", "rest"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole) and whole.keys() == rest.keys()


def test_a_text_slider_resumes_bit_for_bit(tmp_path, checkpoint):
    arguments, _ = text_slider(tmp_path, checkpoint, "--save_state", "--save_every_n_steps", 2)
    assert main(arguments) == 0
    state = tmp_path / "output" / "tiny-step00000002-state"
    assert main([*arguments, "--output_dir", str(tmp_path / "rest"), "--resume", str(state)]) == 0
    whole, rest = (load_file(tmp_path / name / "tiny.safetensors") for name in ("output", "rest"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_preflight_rehearses_the_pairs(tmp_path, checkpoint, capsys):
    arguments, _ = write_pairs(tmp_path, checkpoint, "--preflight_only")
    assert main(arguments) == 0
    assert "loss" in capsys.readouterr().out
    assert main([*arguments, "--debug_dataset"]) == 0
    assert capsys.readouterr().out.count("latents (1, 8, 3, 2, 2)") == 3


def test_unused_flags_are_said_and_ignored(tmp_path, checkpoint, caplog):
    flags = ("--dataset_config", "none.toml", "--validate_every_n_steps", 2, "--caption_dropout_rate", 0.5)
    arguments, _ = write_pairs(tmp_path, checkpoint, *flags, "--latent_frames", 3, "--preflight_only")
    with caplog.at_level("INFO"):
        assert main(arguments) == 0
    assert "sliders do not use --dataset_config, --validate_every_n_steps, --caption_dropout_rate" in caplog.text
    assert "mode reference does not use --latent_frames" in caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--ltx2_mode", "audio"), "sliders train the picture"),
        (("--latent_height", 100), "--latent_height must be a multiple of 32 (got 100)"),
        (("--latent_frames", 0), "--latent_frames must be at least 1"),
        (("--sample_slider_range", "one"), "--sample_slider_range 'one': give numbers"),
        (("--dop",), "--dop does not go with sliders"),
        (("--slider_config", "nowhere.toml"), "--slider_config nowhere.toml: there is no such file"),
        (("--gemma_root", ""), "give --gemma_root or --gemma_safetensors"),
    ],
)
def test_mistakes_of_the_flags(tmp_path, checkpoint, capsys, flags, expected):
    arguments, _ = text_slider(tmp_path, checkpoint, *flags)
    assert expected in errors_of(capsys, arguments)


def test_caches_of_another_checkpoint_are_refused(tmp_path, checkpoint, capsys):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=5)
    arguments, _ = write_pairs(tmp_path, checkpoint, "--ltx2_checkpoint", other)
    assert "do not fit this run" in errors_of(capsys, arguments)


def test_ranges_may_start_with_a_minus():
    parser = build_parser()
    for tokens in (["--sample_slider_range", "-2,1"], ["--sample_slider_range=-2,1"]):
        assert parser.parse_args(join_ranges(tokens)).sample_slider_range == "-2,1"


def test_high_guidance_is_warned_about(tmp_path, checkpoint, caplog):
    arguments, _ = text_slider(tmp_path, checkpoint, "--guidance_strength", 3.5, "--preflight_only")
    assert main(arguments) == 0
    assert "guidance_strength 3.5 is high" in caplog.text
