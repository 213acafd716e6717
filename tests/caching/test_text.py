"""Text caching: what is written, kept, made again and removed."""

from __future__ import annotations

import errno
import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ltx2_tuner import files
from ltx2_tuner.caching import run, text
from ltx2_tuner.checkpoint import Checkpoint, SafetensorsFile
from ltx2_tuner.cli import ltx2_cache_text_encoder_outputs as script
from ltx2_tuner.data.cache_files import read_text
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.sampling.contexts import read_prompt_cache
from ltx2_tuner.sampling.options import SamplingOptions, settle
from ltx2_tuner.sampling.prompts import read_prompts
from ltx2_tuner.text_encoding import GemmaOptions, TextEncoder, load_text_encoder
from tests.caching.text_world import CAPTIONS, World, digests, make_models

TOKENS, VIDEO, AUDIO = 1024, 64, 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def world(models, tmp_path):
    return World(tmp_path / "a folder", models).create()


@pytest.fixture
def encoded(monkeypatch):
    """The captions that went through Gemma, in order."""
    seen: list[str] = []
    original = TextEncoder.encode

    def encode(self, prompts, batch_size=1):
        seen.extend(prompts)
        return original(self, prompts, batch_size)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    return seen


@pytest.fixture
def no_gemma(monkeypatch):
    """Loading Gemma is a failure."""

    def refuse(*_):
        raise AssertionError("Gemma was loaded")

    monkeypatch.setattr(text, "load_text_encoder", refuse)


@pytest.mark.parametrize(("mode", "sound"), [("video", False), ("av", True)])
def test_content_of_a_file(world, mode, sound):
    assert world.run(mode=mode) == 0
    with SafetensorsFile(world.text(1)) as file:
        shapes = {name: (entry.shape, entry.dtype) for name, entry in file.tensors.items()}
        metadata = file.metadata
    expected = {
        "video_prompt_embeds_bfloat16": ((TOKENS, VIDEO), torch.bfloat16),
        "prompt_attention_mask": ((TOKENS,), torch.int64),
    }
    if sound:
        expected["audio_prompt_embeds_bfloat16"] = ((TOKENS, AUDIO), torch.bfloat16)
    assert shapes == expected
    identity = {name: metadata.pop(name) for name in ("component_id", "gemma_id")}
    assert all(len(value) == 16 for value in identity.values())
    assert metadata == {
        "architecture": "ltx2_v1",
        "format_version": "1.0.1",
        "caption1": CAPTIONS[1],
        "ltx_mode": mode,
        "ltx_version": "2.3",
    }


def test_values_are_those_of_the_encoder(world, models):
    assert world.run("--mixed_precision", "no") == 0
    encoder = load_text_encoder(
        GemmaOptions(root=models.gemma), Checkpoint.open(models.checkpoint), "av", torch.device("cpu"), torch.float32
    )
    for index, expected in enumerate(encoder.encode(CAPTIONS)):
        found = read_text(world.text(index))
        torch.testing.assert_close(found.video, expected.video, atol=2e-5, rtol=0)
        torch.testing.assert_close(found.audio, expected.audio, atol=2e-5, rtol=0)
        assert torch.equal(found.mask, expected.mask)


def test_joined_copies_on_request(world):
    assert world.run("--legacy_text_keys") == 0
    with SafetensorsFile(world.text(0)) as file:
        joined = file.read("text_bfloat16")
        parts = [file.read(f"{stream}_prompt_embeds_bfloat16") for stream in ("video", "audio")]
        assert torch.equal(file.read("text_mask"), file.read("prompt_attention_mask"))
    assert torch.equal(joined, torch.cat(parts, dim=-1))


def test_equal_captions_are_encoded_once_and_runs_repeat_byte_for_byte(world, encoded):
    assert world.run() == 0
    assert encoded == list(dict.fromkeys(CAPTIONS))
    first = digests(world.cache)
    assert first["p0_ltx2_te.safetensors"] == first["p2_ltx2_te.safetensors"]
    assert world.run() == 0
    assert digests(world.cache) == first


def test_nothing_to_do_loads_no_gemma(world, no_gemma, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(text, "load_text_encoder", load_text_encoder)
        assert world.run() == 0
    before = digests(world.cache)
    assert world.run("--skip_existing") == 0
    after = digests(world.cache)
    assert world.report()["counts"]["skipped (existing)"] == len(CAPTIONS)
    del before["ltx2_cache_report.json"], after["ltx2_cache_report.json"]
    assert before == after


def test_skip_existing_makes_an_edited_caption_again(world, encoded):
    world.run()
    (world.sources / "p5.txt").write_text("a blue fox")
    encoded.clear()
    assert world.run("--skip_existing") == 0
    assert "a blue fox" in encoded and len(encoded) <= 2  # its batch
    assert world.metadata(5)["caption1"] == "a blue fox"
    assert world.report()["counts"] == {"empty caption": 1, "skipped (existing)": 5, "encoded": 1}


@pytest.mark.parametrize("change", ["mode", "checkpoint", "version", "gemma"])
def test_skip_existing_makes_files_of_other_models_again(world, models, change):
    """T25 and its relatives: what a file was made with stands in the file."""
    world.run()
    flags = {
        "mode": [],
        "checkpoint": ["--ltx2_text_encoder_checkpoint", models.other_checkpoint],
        "version": ["--ltx2_checkpoint", models.old_checkpoint],
        "gemma": ["--gemma_safetensors", models.gemma_fp8],
    }[change]
    before = world.metadata(0)
    assert world.run("--skip_existing", *flags, mode="video" if change == "mode" else "av") == 0
    assert world.report()["counts"]["encoded"] == len(CAPTIONS)
    changed = {name for name, value in world.metadata(0).items() if before[name] != value}
    assert (
        changed
        == {
            "mode": {"ltx_mode"},
            "checkpoint": {"component_id"},
            "version": {"component_id", "ltx_version"},
            "gemma": {"gemma_id"},
        }[change]
    )


def test_audio_embeddings_of_an_earlier_mode_do_not_survive(world):
    world.run(mode="av")
    world.run(mode="video")
    assert read_text(world.text(0)).audio is None


def test_file_of_another_tool_without_fingerprints_is_kept(world, no_gemma):
    tensors = {"video_prompt_embeds_bf16": torch.zeros(4, 4), "prompt_attention_mask": torch.ones(4)}
    world.cache.mkdir()
    for index, caption in enumerate(CAPTIONS):
        write_safetensors(world.text(index), tensors, {"architecture": "ltx2_v1", "caption1": caption})
    assert world.run("--skip_existing") == 0


@pytest.mark.parametrize("keep", [False, True])
def test_orphans(world, keep):
    world.run()
    for index in (0, 1):
        (world.sources / f"p{index}.png").unlink()
    (world.sources / "p2.txt").unlink()  # still a source, so its file is no orphan
    (world.sources / "p3.txt").write_bytes(b"\xff\xfe\xff")
    foreign = world.cache / "foreign_ltx2_te.safetensors"
    foreign.write_bytes(b"something else")
    latent = world.cache / "gone_0064x0064_ltx2.safetensors"
    write_safetensors(latent, {"latents": torch.zeros(1)}, {"architecture": "ltx2_v1"})
    assert world.run(*["--keep_cache"] * keep) == 0
    assert world.text(0).exists() == world.text(1).exists() == keep
    assert world.text(2).exists() and world.text(3).exists() and foreign.exists() and latent.exists()
    assert world.report()["names"]["no caption"] == ["p2.png"]
    assert "p3.txt is not UTF-8" in world.report()["failures"][0]["reason"]


def test_failed_item_is_counted_and_others_go_on(world, monkeypatch, capsys):
    original = TextEncoder.encode

    def encode(self, prompts, batch_size=1):
        results = original(self, prompts, batch_size)
        for prompt, result in zip(prompts, results):
            if prompt == CAPTIONS[1]:
                result.audio[3, 3] = torch.nan
        return results

    monkeypatch.setattr(TextEncoder, "encode", encode)
    assert world.run() == 0
    assert not world.text(1).exists() and world.text(0).exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[Dataset 0] sources 6 | items 6 | encoded 5 | skipped (existing) 0 | failed 1")
    assert lines[-1].startswith("failed 1 ")
    assert world.report()["failures"][0]["item"] == "p1.png"
    assert world.run("--strict") == 1


def interrupt(monkeypatch, after: int) -> None:
    """Make the run end (as a kill would) before file number `after` is written."""
    original, written = text.write_text, []

    def write(path, *rest, **options):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(path)
        original(path, *rest, **options)

    monkeypatch.setattr(text, "write_text", write)


@pytest.mark.parametrize(("after", "first"), [(0, 0), (1, 0), (3, 2), (5, 4)])
def test_interrupted_run_goes_on(world, models, tmp_path, encoded, monkeypatch, after, first):
    """Batches of two distinct captions; one that misses a file is encoded whole."""
    whole = World(tmp_path / "whole", models).create()
    whole.run()
    encoded.clear()
    with monkeypatch.context() as context:
        interrupt(context, after)
        assert world.run() == 130
    assert len(list(world.cache.glob("*.safetensors"))) == after
    encoded.clear()
    assert world.run() == 0
    assert digests(world.cache) == digests(whole.cache)
    assert encoded == list(dict.fromkeys(CAPTIONS))[first:]


def test_other_settings_start_afresh(world, encoded, monkeypatch):
    with monkeypatch.context() as context:
        interrupt(context, 4)
        assert world.run() == 130
    encoded.clear()
    assert world.run("--mixed_precision", "no") == 0
    assert encoded == list(dict.fromkeys(CAPTIONS))


def test_full_disk_keeps_what_is_there(world, monkeypatch, capsys):
    world.run()
    before = digests(world.cache)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: Usage(0, 0, 10))
    (world.sources / "p9.png").touch()
    (world.sources / "p9.txt").write_text("new")
    assert world.run() == 1
    assert "only 10 B are free" in capsys.readouterr().err
    (world.cache / "ltx2_cache_text.journal").unlink()
    assert digests(world.cache) == before
    assert world.run("--ignore_disk_space") == 0


def test_disk_that_fills_up_loses_nothing(world, models, tmp_path, monkeypatch, capsys):
    whole = World(tmp_path / "whole", models).create()
    whole.run()
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) == 5:  # the journal, three files, then this one
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(files.os, "fsync", fsync)
        assert world.run() == 1
    assert "no space left on the disk; free some and run the command again" in capsys.readouterr().err
    assert len(list(world.cache.glob("*.safetensors"))) == 3 and not list(world.cache.glob(".*.tmp"))
    assert world.run() == 0
    assert digests(world.cache) == digests(whole.cache)


def test_dry_run_needs_no_models(world, capsys):
    assert script.main(["--dataset_config", str(world.config), "--dry_run", "--ltx2_mode", "av"]) == 0
    printed = capsys.readouterr().out
    assert "[Dataset 0] sources 6 | items 6" in printed
    assert "expected size of the text caches: 188.7 MB (31.5 MB a caption)" in printed
    assert world.run("--dry_run") == 0
    assert "(196.6 kB a caption)" in capsys.readouterr().out
    assert not world.cache.exists()


def test_validation_datasets_are_cached_too(world, models):
    other = World(world.root / "validation", models).create(["a validation caption"])
    table = f"[[validation_datasets]]\nimage_directory = {json.dumps(str(other.sources))}\n"
    with world.config.open("a", encoding="utf-8") as file:
        file.write(f"{table}cache_directory = {json.dumps(str(other.cache))}\n")
    assert world.run() == 0
    assert other.metadata(0)["caption1"] == "a validation caption"
    assert other.report()["label"] == "Validation 0"


def test_sound_datasets_switch_to_mode_audio(models, tmp_path):
    world = World(tmp_path, models).create(["a whistle"], suffix=".wav", key="audio")
    assert world.run(mode="video") == 0
    assert world.metadata(0)["ltx_mode"] == "audio"
    assert read_text(world.text(0)).audio.shape == (TOKENS, AUDIO)


def test_caption_field(world):
    lines = [{"image_path": str(world.sources / "p0.png"), "long": "a long caption", "caption": "short"}]
    jsonl = world.root / "items.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)))
    world.config.write_text(
        f"[general]\nresolution = 64\n[[datasets]]\nimage_jsonl_file = {json.dumps(str(jsonl))}\n"
        f"cache_directory = {json.dumps(str(world.cache))}\n"
    )
    assert world.run("--caption_field", "long") == 0
    assert world.metadata(0)["caption1"] == "a long caption"


@pytest.mark.parametrize(("mode", "width"), [("video", VIDEO), ("av", VIDEO + AUDIO), ("audio", AUDIO)])
def test_sample_prompts(models, tmp_path, mode, width):
    kind = {"suffix": ".wav", "key": "audio"} if mode == "audio" else {}
    world = World(tmp_path, models).create(["a whistle"], **kind)
    prompts = world.root / "prompts.txt"
    prompts.write_text("a fox --n blurry --w 64\na cat\n")
    assert world.run("--precache_sample_prompts", "--sample_prompts", prompts, mode=mode) == 0
    path = world.cache / "ltx2_sample_prompts_cache.pt"
    document = torch.load(path, weights_only=True)
    assert (document["version"], document["ltx_mode"], document["audio_video"]) == (2, mode, mode == "av")
    kept = ("component_id", "gemma_id")
    assert [document[name] for name in kept] == [world.metadata(0)[name] for name in kept]
    assert [entry["negative_prompt"] for entry in document["prompt_cache"]] == ["blurry", ""]
    for entry in document["prompt_cache"]:
        for name in ("prompt", "negative_prompt"):
            assert entry[f"{name}_embeds"].shape == (TOKENS, width)
            assert entry[f"{name}_attention_mask"].tolist() == [1] * TOKENS
    requests = [
        settle(index, prompt, SamplingOptions(), num_blocks=2) for index, prompt in enumerate(read_prompts(prompts))
    ]
    contexts = read_prompt_cache(path, requests, mode, (VIDEO, AUDIO))
    assert (contexts[0].video is None) == (mode == "audio") and (contexts[0].audio is None) == (mode == "video")
    before = path.read_bytes()
    world.run("--precache_sample_prompts", "--sample_prompts", prompts, mode=mode)
    assert path.read_bytes() == before


def test_preservation_prompts(world, tmp_path):
    path = tmp_path / "kept.pt"
    flags = ["--precache_preservation_prompts", "--preservation_prompts_cache", path]
    assert world.run(*flags, "--blank_preservation", "--dop", "--dop_class_prompt", "a woman") == 0
    document = torch.load(path, weights_only=True)
    assert document["version"] == 1 and document["audio_video"] is True and document["dop_class_prompt"] == "a woman"
    assert torch.equal(document["blank_embed"], read_text(world.text(3)).video)  # the empty caption
    assert document["dop_embed"].shape == (TOKENS, VIDEO) and document["dop_mask"].shape == (TOKENS,)
    assert document["blank_audio_embed"].shape == document["dop_audio_embed"].shape == (TOKENS, AUDIO)
    assert world.run(*flags, "--dop", mode="video") == 0
    assert set(torch.load(path, weights_only=True)) == {
        "version",
        "audio_video",
        "dop_embed",
        "dop_mask",
        "dop_class_prompt",
        "component_id",
        "gemma_id",
    }


def test_settings_that_do_not_go_together_are_named_at_once(world, capsys):
    flags = [
        *("--gemma_load_in_8bit", "--gemma_load_in_4bit", "--gemma_safetensors", "x.safetensors"),
        *("--precache_sample_prompts", "--dop", "--batch_size", "0"),
    ]
    assert world.run(*flags) == 1
    printed = capsys.readouterr().err
    for part in (
        "--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other",
        "--gemma_load_in_8bit works with --gemma_root only",
        "needs a CUDA device",
        "--precache_sample_prompts needs --sample_prompts",
        "--dop has an effect with --precache_preservation_prompts only",
        "--batch_size must be at least 1",
    ):
        assert part in printed
    assert world.run("--precache_preservation_prompts") == 1
    assert "needs --blank_preservation, --dop or both" in capsys.readouterr().err


def test_missing_connectors_stop_before_gemma(world, models, no_gemma, tmp_path, capsys):
    full = Checkpoint.open(models.checkpoint)
    names = [name for name in full.names() if "connector" not in name]
    path = tmp_path / "bare.safetensors"
    write_safetensors(path, {name: full.read(name) for name in names}, full.metadata)
    assert world.run("--ltx2_checkpoint", path, "--gemma_root", Path("nowhere")) == 1
    assert "--ltx2_text_encoder_checkpoint" in capsys.readouterr().err
