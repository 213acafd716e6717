"""What --ic_lora_strategy comes to, and what is said about references that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser, main
from ltx2_tuner.cli.references import LoRAReferences, cached_reference_frames, check_reference_lengths, lora_references
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.data.cache_files import write_audio, write_latents
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.training.sources import Processes, open_sources
from tests.training.tiny import Clip, Workspace, write_checkpoint, write_workspace


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def workspace(folder: Path, checkpoint: Path, *, pictures: int | None = None, sounds: int | None = None) -> Workspace:
    """Two clips with sound; the first `pictures` and `sounds` of them have references, None: no place for any."""
    options = ""
    for name, count in (("reference_cache_directory", pictures), ("reference_audio_cache_directory", sounds)):
        if count is not None:
            options += f"{name} = '{(folder / name).as_posix()}'\n"
            (folder / name).mkdir()
    space = write_workspace(folder, checkpoint, [Clip(sound=17)] * 2, options=options)
    latents = sorted((folder / "datasets").glob("*_ltx2.safetensors"))
    for path in latents[: pictures or 0]:
        facts = {"reference_downscale": "1", "reference_frames": "33"}
        write_latents(folder / "reference_cache_directory" / path.name, torch.randn(8, 5, 2, 2), facts)
    for path in latents[: sounds or 0]:
        name = path.name.replace("_ltx2", "_ltx2_audio")
        write_audio(folder / "reference_audio_cache_directory" / name, torch.randn(2, 9, 16), {})
    return space


def settle(space: Workspace, *flags: str):
    """The configuration of a command line."""
    args = parse_with_config(build_parser(), space.arguments(*flags))
    return args, training_config(args, "no")


@pytest.mark.parametrize(
    ("flags", "strategy", "preset"),
    [
        ((), "none", "t2v"),
        (("--lora_target_preset", "v2v"), "v2v", "v2v"),
        (("--ic_lora_strategy", "v2v"), "v2v", "v2v"),
        (("--ic_lora_strategy", "v2v", "--lora_target_preset", "t2v"), "v2v", "t2v"),
        (("--ic_lora_strategy", "none", "--lora_target_preset", "v2v"), "none", "v2v"),
        (("--ltx2_mode", "av", "--lora_target_preset", "audio_ref_only_ic"), "audio_ref_only_ic", "audio_ref_only_ic"),
        (("--ltx2_mode", "av", "--lora_target_preset", "audio_ref_ic"), "audio_ref_only_ic", "audio_ref_only_ic"),
        (("--ltx2_mode", "av", "--ic_lora_strategy", "audio_ref_ic"), "audio_ref_only_ic", "audio_ref_only_ic"),
        (("--ltx2_mode", "audio", "--ic_lora_strategy", "audio_ref_only_ic"), "audio_ref_only_ic", "audio"),
        (("--ltx2_mode", "audio"), "none", "audio"),
    ],
)
def test_strategy_and_preset(tmp_path, checkpoint, flags, strategy, preset):
    _, config = settle(workspace(tmp_path, checkpoint, pictures=2, sounds=2), *flags)
    assert (config.strategy, config.network.preset) == (strategy, preset)
    assert (config.batches.references, config.batches.reference_audio) == (
        strategy == "v2v",
        strategy == "audio_ref_only_ic",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ltx2_mode", "av", "--ic_lora_strategy", "v2v"), "video-only; use --ltx2_mode video, not av"),
        (("--ltx2_mode", "av", "--lora_target_preset", "v2v"), "video-only; use --ltx2_mode video, not av"),
        (("--ic_lora_strategy", "audio_ref_only_ic"), "use --ltx2_mode av or audio"),
        (("--lora_target_preset", "audio_ref_only_ic"), "needs --ltx2_mode av or audio"),
        (
            ("--ltx2_mode", "av", "--ic_lora_strategy", "audio_ref_only_ic"),
            "needs reference_audio_directory and reference_audio_cache_directory in datasets[0]",
        ),
        (("--sample_two_stage",), "--sample_two_stage needs --spatial_upsampler_path"),
        (("--sample_two_stage", "--spatial_upsampler_path", "none.safetensors"), "there is no such file"),
        (("--reference_frames", "0"), "must be at least 1"),
    ],
)
def test_misuse_is_refused(tmp_path, checkpoint, capsys, flags, message):
    space = workspace(tmp_path, checkpoint, pictures=2)
    assert main(space.arguments(*flags)) == 1
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_v2v_without_references(tmp_path, checkpoint, capsys, caplog):
    space = workspace(tmp_path, checkpoint)
    assert main(space.arguments("--ic_lora_strategy", "v2v")) == 1
    assert "needs reference_directory and reference_cache_directory in datasets[0]" in capsys.readouterr().err
    with caplog.at_level("INFO"):
        _, config = settle(space, "--lora_target_preset", "v2v")
    assert config.strategy == "none" and "trained as plain video" in caplog.text


def test_unused_references_and_flags_are_told(tmp_path, checkpoint, caplog):
    space = workspace(tmp_path, checkpoint, pictures=2, sounds=2)
    settle(space, "--ltx2_mode", "av", "--audio_ref_use_negative_positions")
    for part in ("references, which are ignored", "reference sound, which is ignored", "positions has no effect"):
        assert part in caplog.text


def test_items_without_a_reference_are_left_out(tmp_path, checkpoint, capsys, caplog):
    space = workspace(tmp_path, checkpoint, pictures=1)
    _, config = settle(space, "--ic_lora_strategy", "v2v")
    sources = open_sources(config, Processes(torch.device("cpu")))
    assert [item.stem for item in sources.training.items] == ["datasets0"]
    assert "no_reference 1 (datasets1_00000-017)" in caplog.text
    next((tmp_path / "reference_cache_directory").iterdir()).unlink()
    assert main(space.arguments("--ic_lora_strategy", "v2v")) == 1
    assert "lack the cached reference that this training needs" in capsys.readouterr().err


def test_references_longer_than_their_targets(tmp_path, checkpoint, caplog):
    space = workspace(tmp_path, checkpoint, pictures=2)
    args, config = settle(space, "--ic_lora_strategy", "v2v", "--reference_frames", "9")
    inventories = open_sources(config, Processes(torch.device("cpu"))).training.inventories
    args.sample_prompts = "prompts.txt"
    check_reference_lengths(args, inventories)
    assert "2 items are shorter than their references" in caplog.text
    assert "caches hold references of 33 frames, samples are made with --reference_frames 9" in caplog.text
    assert cached_reference_frames(inventories) == 33


def lora(path: Path, **metadata: str) -> str:
    write_safetensors(path, {"x": torch.zeros(1)}, metadata)
    return str(path)


def test_a_lora_says_what_references_it_wants(tmp_path):
    factor = {"reference_downscale_factor": "2"}
    v2v = lora(tmp_path / "v2v.safetensors", ss_v2v_training="True", **factor)
    voice = lora(
        tmp_path / "voice.safetensors",
        ss_ic_lora_strategy="audio_ref_ic",
        ss_audio_ref_use_negative_positions="True",
    )
    plain = lora(tmp_path / "plain.safetensors")
    assert lora_references([]) == lora_references([plain]) == LoRAReferences()
    assert lora_references([plain, v2v]) == LoRAReferences("v2v", 2, False)
    assert lora_references([voice, plain]) == LoRAReferences("audio_ref_only_ic", None, True)
    with pytest.raises(UserError, match="was trained with --ic_lora_strategy audio_ref_only_ic, another LoRA with v2v"):
        lora_references([v2v, voice])
