"""The text caching script as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.caching.text_world import CAPTIONS, World, make_models

SCRIPT = Path(__file__).parents[2] / "ltx2_cache_text_encoder_outputs.py"


def start(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_run_from_another_folder(tmp_path):
    """Spaces and non-ASCII letters in every path, relative paths from the working directory."""
    models = make_models(tmp_path)
    world = World(tmp_path / "dossier d'été", models).create(["un café, s'il vous plaît", *CAPTIONS])
    result = start(*world.arguments(), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "[Dataset 0] sources 7 | items 7 | encoded 7 | skipped (existing) 0 | failed 0 | empty caption 1"
    )
    assert "text: 100%" in result.stderr
    assert world.metadata(0)["caption1"] == "un café, s'il vous plaît"


def test_help_names_every_flag():
    from ltx2_tuner.cli.ltx2_cache_text_encoder_outputs import build_parser

    parser = build_parser()
    text = parser.format_help()
    listed = """
        --ltx2_checkpoint --ltx2_text_encoder_checkpoint --gemma_root --gemma_safetensors --gemma_load_in_8bit
        --gemma_load_in_4bit --gemma_bnb_4bit_quant_type --gemma_bnb_4bit_disable_double_quant
        --gemma_bnb_4bit_compute_dtype --gemma_fp8_weight_offload --no-gemma_fp8_weight_offload --dataset_config
        --device --mixed_precision --ltx2_mode --ltx_mode --batch_size --num_workers --skip_existing --keep_cache
        --precache_sample_prompts --sample_prompts --sample_prompts_cache --precache_preservation_prompts
        --blank_preservation --dop --dop_class_prompt --preservation_prompts_cache --caption_field --guidance_scale
        --legacy_text_keys --dry_run --ignore_disk_space --strict --help --version
    """
    expected = listed.split()
    assert set(parser.flags()) == set(expected)
    assert all(flag in text for flag in expected)
