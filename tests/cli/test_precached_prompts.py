"""Prompts that were cached beforehand are used without a flag where they fit, and the log says so (spec 08, G9)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from ltx2_tuner.caching.text_side_files import PreservationFile, SamplePromptsFile
from ltx2_tuner.checkpoint import Checkpoint, component_id
from ltx2_tuner.cli.ltx2_train_network import main
from ltx2_tuner.text_encoding import GemmaOptions, load_text_encoder, write_tiny_gemma
from ltx2_tuner.text_encoding.encoder import read_gemma_id
from tests.training.tiny import Workspace, write_checkpoint, write_workspace

FITS = "which fits this run; Gemma is not loaded"
PRESERVE = ("--blank_preservation", "--dop", "--dop_args", "class=woman", "--max_train_steps", 1)
SAMPLE = ("--sample_every_n_steps", 1, "--vae_dtype", "float32", "--max_train_steps", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "tiny.safetensors")
    write_tiny_gemma(folder / "gemma")
    write_tiny_gemma(folder / "other gemma", seed=5)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, models) -> Path:
    """A folder with both side files as the text script writes them, and the prompt file."""
    folder = tmp_path_factory.mktemp("cached")
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --f 9 --s 1\n", encoding="utf-8")
    checkpoint, gemma = Checkpoint.open(models / "tiny.safetensors"), GemmaOptions(root=models / "gemma")
    made_with = {"component_id": component_id(checkpoint, "text"), "gemma_id": read_gemma_id(gemma)}
    encoder = load_text_encoder(gemma, checkpoint, "video", torch.device("cpu"), torch.float32)
    PreservationFile(folder / "preservation.pt", True, "woman").write(encoder, "video", made_with)
    SamplePromptsFile(folder / "samples.pt", [("a cat", "")]).write(encoder, "video", made_with)
    encoder.close()
    return folder


@pytest.fixture
def space(tmp_path, models) -> Workspace:
    return write_workspace(tmp_path, models / "tiny.safetensors")


def put(space: Workspace, source: Path, name: str, **changes: object) -> Path:
    """A side file in the first cache directory; a change to None takes a key out."""
    document = torch.load(source, weights_only=True) | changes
    path = space.root / "datasets" / name
    torch.save({key: value for key, value in document.items() if value is not None}, path)
    return path


def run(space: Workspace, *flags: object) -> int:
    return main(space.arguments(*flags))


def test_preservation_prompts_need_no_flag(space, files, caplog):
    caplog.set_level(logging.INFO)
    path = put(space, files / "preservation.pt", "ltx2_preservation_cache.pt")
    assert run(space, *PRESERVE) == 0
    assert f"the preservation prompts come from {path}, {FITS}" in caplog.text


def test_sample_prompts_need_no_flag(space, files, caplog):
    caplog.set_level(logging.INFO)
    path = put(space, files / "samples.pt", "ltx2_sample_prompts_cache.pt")
    assert run(space, "--sample_prompts", files / "prompts.txt", *SAMPLE) == 0
    assert f"the sample prompts come from {path}, {FITS}" in caplog.text
    assert list((space.output / "sample").glob("*.mp4"))


def test_a_fitting_cache_wins_over_loading_gemma(space, models, files, caplog, monkeypatch):
    """Gemma's files are there, and are only looked at."""
    caplog.set_level(logging.INFO)
    put(space, files / "preservation.pt", "ltx2_preservation_cache.pt")
    monkeypatch.setattr("ltx2_tuner.text_encoding.load_text_encoder", lambda *_, **__: pytest.fail("Gemma is loaded"))
    assert run(space, *PRESERVE, "--gemma_root", models / "gemma") == 0
    assert FITS in caplog.text


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"component_id": "0" * 16}, (), "was made with another checkpoint"),
        ({"component_id": None}, (), "does not say which checkpoint it was made with"),
        ({}, ("--gemma_root", "other gemma"), "was made with another Gemma"),
        ({}, ("--dop_args", "class=cat"), "was made for the class 'woman', but --dop_args says class=cat"),
        ({}, ("--dop_args", "multiplier=0.5"), "was made for the class 'woman', but --dop_args says class="),
        ({"blank_embed": None}, (), "holds no prompt for --blank_preservation"),
    ],
)
def test_a_cache_that_does_not_fit_is_left_for_gemma(space, models, files, caplog, capsys, changes, flags, reason):
    caplog.set_level(logging.INFO)
    put(space, files / "preservation.pt", "ltx2_preservation_cache.pt", **changes)
    flags = tuple(models / flag if "gemma" in flag and "--" not in flag else flag for flag in flags)
    gemma = () if "--gemma_root" in flags else ("--gemma_root", models / "gemma")
    assert run(space, *PRESERVE, *gemma, *flags) == 0
    assert "Gemma encodes the preservation prompts: " in caplog.text and reason in caplog.text
    assert FITS not in caplog.text
    if gemma:  # and without Gemma the reason is the error
        assert run(space, *PRESERVE, *flags) == 1
        assert reason in capsys.readouterr().err


def test_other_sample_prompts_are_left_for_gemma(space, models, files, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    put(space, files / "samples.pt", "ltx2_sample_prompts_cache.pt")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 64 --h 64 --f 9 --s 1\n", encoding="utf-8")
    assert run(space, "--sample_prompts", prompts, *SAMPLE, "--gemma_root", models / "gemma") == 0
    assert "Gemma encodes the sample prompts: " in caplog.text and "expected 'a dog'" in caplog.text
    assert run(space, "--sample_prompts", prompts, *SAMPLE) == 1
    assert "expected 'a dog'" in capsys.readouterr().err


@pytest.mark.parametrize(("policy", "status"), [("error", 1), ("warn", 0), ("off", 0)])
def test_a_cache_that_is_asked_for_follows_the_cache_check(space, files, caplog, capsys, policy, status):
    put(space, files / "preservation.pt", "ltx2_preservation_cache.pt", component_id="0" * 16)
    assert run(space, *PRESERVE, "--use_precached_preservation", "--cache_check_mode", policy) == status
    told = caplog.text + capsys.readouterr().err
    assert ("was made with another checkpoint" in told) == (policy != "off")


def test_a_cache_of_another_tool_is_used_when_asked_for(space, files):
    put(space, files / "preservation.pt", "ltx2_preservation_cache.pt", component_id=None, gemma_id=None)
    assert run(space, *PRESERVE, "--use_precached_preservation") == 0


def test_all_that_is_missing_is_named_at_once(space, files, capsys):
    assert run(space, *PRESERVE, "--sample_prompts", files / "prompts.txt", *SAMPLE, "--network_dim", 0) == 1
    told = capsys.readouterr().err
    for part in ("samples need --gemma_root", "--blank_preservation and --dop need --gemma_root", "--network_dim"):
        assert part in told
