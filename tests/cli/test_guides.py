"""The guides under docs name flags that exist, and their dataset files load."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ltx2_tuner.cli.parser import SCRIPTS
from ltx2_tuner.data.config import load_dataset_config
from ltx2_tuner.sampling.prompts import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md"))
# Flags of other programs that the guides call.
FOREIGN = {"--mixed_precision", "--num_processes", "--use_fsdp", "--fsdp_version", "--help", "--version"}


@pytest.fixture(scope="module")
def known() -> set[str]:
    flags = FOREIGN | {f"--{letters}" for letters in OPTIONS}
    for script in SCRIPTS:
        module = importlib.import_module(f"ltx2_tuner.cli.{script}")
        flags |= set(module.build_parser()._option_string_actions)
    for program in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        flags |= set(re.findall(r'"(--[a-z][a-z_-]*)"', program.read_text(encoding="utf-8")))
    return flags


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("guide", [path.name for path in GUIDES])
def test_flags_exist(guide, known):
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    commands = "\n".join(line for line in text.splitlines() if not re.search(r"\b(pip|git|hf|huggingface-cli)\b", line))
    found = set(re.findall(r"(?<![\w-])--[a-z](?:[a-z0-9_]|-(?=[a-z]))*", commands))
    assert sorted(found - known) == []


@pytest.mark.parametrize("number", range(3))
def test_dataset_files_of_the_sound_guide_load(number, tmp_path):
    examples = blocks((ROOT / "docs" / "sound.md").read_text(encoding="utf-8"), "toml")
    assert len(examples) == 3
    path = tmp_path / "dataset.toml"
    path.write_text(examples[number], encoding="utf-8")
    for folder in re.findall(r'(?:video|image|audio)_directory = "(\w+)"', examples[number]):
        (tmp_path / folder).mkdir()
    text = examples[number].replace('_directory = "', f'_directory = "{tmp_path.as_posix()}/')
    path.write_text(text, encoding="utf-8")
    config = load_dataset_config(path, "audio" if "audio_directory" in text else "av")
    assert config.datasets


@pytest.mark.parametrize("guide", [path.name for path in GUIDES])
def test_links_lead_somewhere(guide):
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
        path = ROOT / "docs" / (target or guide)
        assert path.exists(), f"{guide}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in names, f"{guide}: {target}{anchor}"
