"""The recipes of configs/ for each size of card are accepted, and docs name them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.cli.training_config import training_config
from tests.training.tiny import Clip, write_checkpoint, write_workspace

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(ROOT.glob("configs/train_*gb.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted(tmp_path, recipe):
    space = write_workspace(tmp_path, write_checkpoint(tmp_path / "tiny.safetensors"), [Clip(sound=17)])
    arguments = ["--config_file", str(recipe), "--ltx2_checkpoint", str(space.checkpoint), "--ltx2_mode", "av"]
    arguments += ["--dataset_config", str(space.dataset), "--output_dir", str(space.output), "--output_name", "x"]
    args = parse_with_config(build_parser(), arguments)
    config = training_config(args, args.mixed_precision)
    size = int(re.search(r"(\d+)gb", recipe.name)[1])
    assert config.memory.budget_gb in (None, size)
    assert config.memory.blocks_to_swap is None and config.memory.checkpointing is None, "left to the planner"


def test_the_guide_names_every_recipe():
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert RECIPES and all(recipe.name in text for recipe in RECIPES)
