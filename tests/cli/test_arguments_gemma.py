"""The flags that say how Gemma is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from ltx2_tuner.cli.arguments_gemma import OFFLOAD_VARIABLE, add_gemma_arguments, check_gemma, gemma_options
from ltx2_tuner.text_encoding import GemmaOptions


def parse(*flags: str, device: str | None = "cpu") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_gemma_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(flags)), device=device)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv(OFFLOAD_VARIABLE, raising=False)


def test_defaults():
    assert gemma_options(parse("--gemma_root", "g")) == GemmaOptions(root=Path("g"))


def test_file_wins_over_folder(caplog):
    options = gemma_options(parse("--gemma_root", "g", "--gemma_safetensors", "f.safetensors"))
    assert options.source == Path("f.safetensors") and options.root == Path("g")
    assert "--gemma_safetensors wins" in caplog.text


def test_every_value_arrives():
    flags = [
        *("--gemma_root", "g", "--gemma_load_in_4bit", "--gemma_bnb_4bit_quant_type", "fp4"),
        *("--gemma_bnb_4bit_disable_double_quant", "--gemma_bnb_4bit_compute_dtype", "fp16"),
    ]
    args = parse(*flags, device="cuda:1")
    assert check_gemma(args, required=True) == []
    assert gemma_options(args) == GemmaOptions(
        root=Path("g"),
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_double_quant=False,
        bnb_4bit_compute_dtype=torch.float16,
    )


@pytest.mark.parametrize(
    ("value", "flag", "expected"),
    [
        (None, None, True),
        ("0", None, False),
        ("Yes", None, True),
        ("off", None, False),
        ("0", "--gemma_fp8_weight_offload", True),
        ("1", "--no-gemma_fp8_weight_offload", False),
    ],
)
def test_offload_flag_wins_over_the_environment(monkeypatch, value, flag, expected):
    if value is not None:
        monkeypatch.setenv(OFFLOAD_VARIABLE, value)
    args = parse("--gemma_safetensors", "g.safetensors", *([flag] if flag else []))
    assert check_gemma(args) == []
    assert gemma_options(args).fp8_weight_offload is expected


@pytest.mark.parametrize(
    ("flags", "device", "error"),
    [
        ([], "cpu", "give --gemma_root or --gemma_safetensors"),
        (["--gemma_load_in_8bit", "--gemma_load_in_4bit", "--gemma_root", "g"], "cuda", "exclude each other"),
        (["--gemma_load_in_8bit", "--gemma_safetensors", "g"], "cuda", "works with --gemma_root only"),
        (["--gemma_load_in_4bit"], "cuda", "--gemma_load_in_4bit needs --gemma_root"),
        (["--gemma_load_in_4bit", "--gemma_root", "g"], "cpu", "needs a CUDA device"),
        (["--gemma_root", "g", "--gemma_bnb_4bit_quant_type", "nf4"], "cuda", "with --gemma_load_in_4bit only"),
        (["--gemma_root", "g", "--gemma_bnb_4bit_compute_dtype", "auto"], "cuda", "with --gemma_load_in_4bit only"),
        (["--gemma_root", "g", "--gemma_bnb_4bit_disable_double_quant"], "cuda", "with --gemma_load_in_4bit only"),
        (["--gemma_root", "g", "--no-gemma_fp8_weight_offload"], "cpu", "with --gemma_safetensors only"),
    ],
)
def test_flags_that_do_not_go_together(flags, device, error):
    errors = check_gemma(parse(*flags, device=device), required=True)
    assert any(error in line for line in errors)
