"""The commands of the guides, run as they stand there, on tiny files of those names."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.files import load_lora
from ltx2_tuner.lora.formats import LoRAMatrices, to_original
from ltx2_tuner.media.write import write_image
from ltx2_tuner.text_encoding import write_tiny_gemma
from ltx2_tuner.training.run_log import read_log
from tests.training.tiny import Clip, write_checkpoint, write_workspace

ROOT = Path(__file__).resolve().parents[2]
# What makes a command fit this machine; the guides leave it out.
SMALL = ["--device", "cpu", "--dit_dtype", "float32", "--mixed_precision", "no", "--max_data_loader_n_workers", "0"]


def commands(guide: str) -> list[list[str]]:
    """Every `python …` line of a guide's code blocks."""
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    blocks = text.split("```")[1::2]
    lines = [line for block in blocks if block.startswith("\n") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def run(words: list[str], *more: object) -> None:
    script, *arguments = words
    assert (ROOT / script).is_file()
    main = importlib.import_module(f"ltx2_tuner.cli.{script.removesuffix('.py')}").main
    assert main([*arguments, *map(str, more)]) == 0, words


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working directory of a reader of the guides."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "ltx-2.3.safetensors")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def write_lora(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = {"attn1.to_q": 64, "audio_attn1.to_q": 32}
    modules = {
        f"transformer_blocks.0.{name}": LoRAMatrices(
            torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator), 1.0
        )
        for name, width in widths.items()
    }
    write_safetensors(path, to_original(modules), {"ss_network_dim": "2"})


def test_every_guide_starts_with_a_command():
    for guide in ("sliders.md", "merging.md", "resume.md", "logging.md", "optimizers.md"):
        title, blank, fence, command = (ROOT / "docs" / guide).read_text(encoding="utf-8").splitlines()[:4]
        assert title.startswith("# ") and not blank and fence == "```" and command.startswith("python ")


def test_merging(place):
    names = ["style", "person", *(f"run-step{step:08d}" for step in (200, 400, 600))]
    for seed, name in enumerate(names):
        write_lora(place / f"{name}.safetensors", seed)
    found = commands("merging.md")
    assert len(found) == 6
    for words in found:
        run(words)
    both = load_lora(place / "both.safetensors").modules
    parts = [load_lora(place / f"{name}.safetensors").modules for name in ("style", "person")]
    for path, module in both.items():
        expected = parts[0][path].delta() + 0.7 * parts[1][path].delta()
        torch.testing.assert_close(module.delta(), expected, rtol=1e-5, atol=1e-5)
    assert all("audio" not in path for path in load_lora(place / "silent.safetensors").modules)
    assert load_lora(place / "run-ema.safetensors").modules.keys() == both.keys()


def test_sliders(place):
    write_tiny_gemma(place / "gemma", seed=0)
    for name in ("smiling", "neutral"):
        for number in range(2):
            picture = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            write_image(place / name / f"face{number}.png", picture // (1 + (name == "neutral")))
            (place / name / f"face{number}.txt").write_text("a face", encoding="utf-8")
        (place / f"{name}.toml").write_text(
            f'[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\n[[datasets]]\nimage_directory = "{name}"\n'
            f'cache_directory = "cache_{name}"\n',
            encoding="utf-8",
        )
    guide = (ROOT / "docs" / "sliders.md").read_text(encoding="utf-8")
    (words_file, smile) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    (place / "configs" / "slider_text.toml").write_text(words_file, encoding="utf-8")
    (place / "smile.toml").write_text(smile, encoding="utf-8")
    small = [*SMALL, "--max_train_steps", "2", "--lr_warmup_steps", "0", "--lr_scheduler", "constant", "--seed", "1"]
    small += ["--optimizer_type", "AdamW", "--latent_height", "64", "--latent_width", "64"]
    for words in commands("sliders.md"):
        if words[0] == "ltx2_train_slider.py":
            run(words, *small)
        else:
            run(words, "--device", "cpu")
    for name in ("slider", "smile"):
        assert load_lora(place / "output" / f"{name}.safetensors").modules


def write_run(place: Path) -> None:
    """The `train.toml` of the guides, with two clips to train on and one to validate with."""
    write_workspace(place, place / "ltx-2.3.safetensors", [Clip(sound=17)] * 2, validation=[Clip()])
    (place / "train.toml").write_text(
        'ltx2_checkpoint = "ltx-2.3.safetensors"\ndataset_config = "data.toml"\noutput_dir = "output"\n'
        'output_name = "my_lora"\nlearning_rate = 1e-4\nnetwork_dim = 4\nseed = 1\n',
        encoding="utf-8",
    )


_PACKAGES = {"Prodigy": "prodigyopt", "schedulefree": "schedulefree", "prodigyplus": "prodigyplus"}


@pytest.mark.parametrize("number", range(12))
def test_optimizers(place, number):
    found = commands("optimizers.md")
    assert len(found) == 12
    words = found[number]
    for word, package in _PACKAGES.items():
        if any(flag.split(".")[0] == word for flag in words):
            pytest.importorskip(package)
    write_run(place)
    write_lora(place / "style.safetensors", 0)
    run(words, *SMALL, "--max_train_steps", 40, "--no_report")
    rows = read_log(place / "output" / "my_lora.log.csv")
    assert len(rows) == 40 and any(name.startswith("lr/") for name in rows[0])


def test_validation(place):
    write_run(place)
    (words,) = [words for words in commands("resume.md") if "--validate_every_n_steps" in words]
    run(words, *SMALL, "--max_train_steps", 250, "--no_report")
    assert "val_loss" in read_log(place / "output" / "my_lora.log.csv")[-1]


@pytest.mark.parametrize("guide", ["resume.md", "logging.md"])
def test_training(place, guide):
    """The first command of a guide, twice where it is meant to go on."""
    write_run(place)
    first = commands(guide)[0]
    run(first, *SMALL, "--max_train_steps", 2)
    assert (place / "output" / "my_lora.report.html").is_file() and (place / "output" / "my_lora.log.csv").is_file()
    if guide == "logging.md":
        assert list((place / "logs").rglob("events.out.tfevents.*"))
        run(["ltx2_train_network.py", "--config_file", "output/my_lora.config.toml", "--output_dir", "again"])
        assert (place / "again" / "my_lora.safetensors").is_file()
        return
    assert (place / "output" / "my_lora-state" / "state_manifest.json").is_file()
    run(first, *SMALL, "--max_train_steps", 3)
