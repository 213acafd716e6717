"""Whole runs of the latent script on a tiny checkpoint: what is written, kept, made again and removed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, component_id, load_video_encoder, write_tiny_checkpoint
from ltx2_tuner.data.cache_files import read_audio, read_latents
from ltx2_tuner.errors import UserError
from ltx2_tuner.media.video import read_frames
from ltx2_tuner.media.write import write_image
from tests.caching.latents_world import World, digests
from tests.media.zoo import make_clip, numbered_frames


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture
def world(tmp_path, checkpoint):
    return World(tmp_path, checkpoint)


def test_clips_become_latents_with_names_and_metadata(world, checkpoint, capsys):
    clip = world.add_clip("a b.mp4", 20, rate=30)
    world.configure(target_frames=[1, 9, 50], frame_extraction="head", batch_size=2)
    assert world.run() == 0
    # 30 FPS become 25: 17 output frames, and no window of 49.
    assert world.names() == ["a b_00000-001_ltx2", "a b_00000-009_ltx2"]
    metadata = world.metadata("a b_00000-009*")
    stat = clip.stat()
    assert metadata["architecture"] == "ltx2_v1"
    assert metadata["frame_count"] == "9"
    assert metadata["bucket"] == "96x64"
    assert (metadata["crop_start"], metadata["source_fps"], metadata["target_fps"]) == ("0", "30.0", "25.0")
    assert metadata["source_path"] == "../my clips, été [1]/a b.mp4"
    assert (metadata["source_size"], metadata["source_mtime_ns"]) == (str(stat.st_size), str(stat.st_mtime_ns))
    assert metadata["component_id"] == component_id(Checkpoint.open(checkpoint), "video_encoder")
    assert json.loads(metadata["preprocess"]) == {"ltx_mode": "video", "tiles": None, "vae_dtype": "float32"}

    frames = read_frames(clip, [0, 2, 3, 4, 5, 6, 8, 9, 10])  # ceil(j * 30 / 25)
    pixels = torch.from_numpy(frames)[None].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    encoder = load_video_encoder(Checkpoint.open(checkpoint), "cpu", torch.float32)
    cached = read_latents(next(world.cache.glob("a b_00000-009*"))).latents
    with torch.no_grad():
        assert torch.allclose(cached, encoder(pixels)[0], atol=1e-5)


def test_bad_clips_are_counted_and_the_others_go_on(world, capsys):
    good = world.add_clip("good.mp4")
    world.add_clip("short.mp4", 5)
    world.add_clip("silent caption.mp4", caption=None)
    for name, content in (("broken.mp4", good.read_bytes()[:900]), ("empty.mp4", b"")):
        (world.clips / name).write_bytes(content)
        (world.clips / name).with_suffix(".txt").write_text("x")
    world.configure(target_frames=[9])
    assert world.run() == 0
    output = capsys.readouterr().out
    assert "[Dataset 0] sources 5 | items 1 | encoded 1 | skipped (existing) 0 | failed 2" in output
    assert "no caption 1" in output
    assert "too short: short.mp4 (5 frames)" in output
    assert "failed: [Dataset 0] broken.mp4" in output
    assert output.strip().splitlines()[-1].startswith("failed 2")
    report = json.loads((world.cache / "ltx2_cache_report.json").read_text(encoding="utf-8"))["latents"]
    assert [failure["item"] for failure in report["failures"]] == ["broken.mp4", "empty.mp4"]
    assert world.run("--strict") == 1


def test_pictures(world, capsys):
    picture = numbered_frames(1, 120, 70)[0]
    write_image(world.clips / "a.png", picture)
    write_image(world.clips / "cut.png", np.random.default_rng(0).integers(0, 255, (70, 120, 3), np.uint8))
    cut = world.clips / "cut.png"
    cut.write_bytes(cut.read_bytes()[:9000])
    for name in ("a", "cut"):
        (world.clips / f"{name}.txt").write_text("a picture")
    world.configure("image_directory", enable_bucket=True)
    assert world.run(mode="av") == 0
    assert "encoded 1 | skipped (existing) 0 | failed 1" in capsys.readouterr().out
    (path,) = world.cache.glob("a_*.safetensors")
    assert path.name == "a_0120x0070_ltx2.safetensors"  # the size of the source, not of the bucket
    metadata = world.metadata("a_*")
    assert (metadata["bucket"], metadata.get("frame_count")) == ("96x64", None)
    assert read_latents(path).latents.shape[1:] == (1, 2, 3)


def test_no_usable_item_is_an_error_status(world):
    world.add_clip("short.mp4", 3)
    world.configure(target_frames=[9])
    assert world.run() == 1


def test_equal_runs_give_equal_bytes_whatever_is_missing_and_however_many_workers(world):
    for number in range(5):
        world.add_clip(f"{number}.mp4", 20)
    world.configure(target_frames=[1, 9], frame_extraction="slide", frame_stride=4, batch_size=3)
    assert world.run() == 0
    whole = digests(world.cache)
    assert len(whole) == 5 * (5 + 3)
    for name in list(whole)[::3]:
        (world.cache / name).unlink()
    assert world.run("--skip_existing", "--num_workers", 2) == 0
    assert digests(world.cache) == whole


def test_skip_existing_keeps_what_fits_and_says_what_does_not(world, capsys, caplog):
    world.add_clip("a.mp4")
    changed = world.add_clip("b.mp4")
    world.configure(target_frames=[9])
    world.run()
    capsys.readouterr()

    assert world.run("--skip_existing") == 0
    assert "encoded 0 | skipped (existing) 2" in capsys.readouterr().out

    os.utime(changed, ns=(1, 1))
    caplog.set_level("INFO")
    world.run("--skip_existing")
    assert "encoded 1 | skipped (existing) 1" in capsys.readouterr().out
    assert "b_00000-009_0096x0064_ltx2.safetensors: stale, made again: the source file changed" in caplog.text

    world.configure(target_frames=[9], target_fps=24.0)
    world.run("--skip_existing")
    assert "encoded 2" in capsys.readouterr().out

    world.run("--skip_existing", "--vae_spatial_tile_size", 96)
    assert "encoded 2" in capsys.readouterr().out
    assert json.loads(world.metadata("a_*")["preprocess"])["tiles"] == {"spatial_overlap": 64, "spatial_size": 96}

    other = world.folder / "other.safetensors"
    write_tiny_checkpoint(other, seed=1)
    world.run("--skip_existing", "--vae_spatial_tile_size", 96, "--vae", other)
    assert "encoded 2" in capsys.readouterr().out


def test_orphans_are_removed_with_their_siblings_and_strangers_stay(world):
    world.add_clip("a.mp4", 20)
    gone = world.add_clip("gone.mp4", 20)
    world.configure(target_frames=[9])
    world.run()
    orphan = next(world.cache.glob("gone*"))
    features = orphan.with_name(orphan.name.replace("_ltx2", "_ltx2_dino"))
    features.write_bytes(b"features")
    stranger = world.cache / "mine_00000-009_0096x0064_ltx2.safetensors"
    stranger.write_bytes(b"not ours")
    gone.unlink()
    world.run("--keep_cache")
    assert orphan.exists()
    world.run()
    assert not orphan.exists()
    assert not features.exists()
    assert stranger.exists()


def test_sources_that_fail_keep_their_old_caches(world):
    world.add_clip("a.mp4", 20)
    bad = world.add_clip("b.mp4", 20)
    world.configure(target_frames=[9])
    world.run()
    bad.write_bytes(b"")
    world.run()
    assert world.names() == ["a_00000-009_ltx2", "b_00000-009_ltx2"]


def test_sound_goes_with_its_pictures(world, capsys):
    world.add_clip("talk.mp4", 25, seconds=1.0)
    world.add_clip("mute.mp4", 25)
    world.configure(target_frames=[9], frame_extraction="chunk")
    assert world.run(mode="av") == 0
    output = capsys.readouterr().out
    assert "Audio: encoded 2, failed 0, no audio 2, silent 0, skipped (existing) 0" in output
    assert "talk_00009-009_ltx2_audio" in world.names()
    cached = read_audio(next(world.cache.glob("talk_00009-009*_audio.safetensors")))
    assert cached.latents.shape[1] == cached.length == 10  # 9 frames at 25 FPS are 0.36 s
    assert float(world.metadata("talk_00009-009*_audio")["duration_seconds"]) == pytest.approx(0.36, abs=1e-4)
    silence = read_audio(world.cache / "ltx2_silence_latent.safetensors")
    assert silence.length == 251


def test_sound_of_retimed_pictures_is_stretched_unless_told_otherwise(world):
    world.add_clip("film.mp4", 24, rate=24, seconds=1.0)
    world.configure(target_frames=[17])
    world.run(mode="av")
    seconds = float(world.metadata("film_*_audio")["duration_seconds"])
    assert seconds == pytest.approx(17 / 25, abs=1e-3)
    world.run("--preserve_audio_timing", mode="av")
    seconds = float(world.metadata("film_*_audio")["duration_seconds"])
    assert seconds == pytest.approx(17 / 24, abs=1e-3)


def test_lost_sound_is_a_failure(world, capsys):
    world.add_clip("a.mp4", 20, seconds=0.8)
    sounds = world.folder / "sounds"
    sounds.mkdir()
    (sounds / "a.wav").write_bytes(b"RIFF")
    world.configure(target_frames=[9])
    arguments = ("--ltx2_audio_source", "audio_files", "--ltx2_audio_dir", sounds)
    assert world.run(*arguments, mode="av") == 1
    assert "Audio: encoded 0, failed 1" in capsys.readouterr().out
    (sounds / "a.wav").unlink()
    assert world.run(*arguments, mode="av") == 0  # no file at all is no failure
    assert "no audio 1" in capsys.readouterr().out


def test_sound_that_went_away_takes_its_cache_along(world):
    world.add_clip("a.mp4", 20, seconds=0.8)
    world.configure(target_frames=[9])
    world.run(mode="av")
    assert "a_00000-009_ltx2_audio" in world.names()
    world.add_clip("a.mp4", 20)
    world.run(mode="av")
    assert world.names() == ["a_00000-009_ltx2"]


def test_sound_alone(world, capsys):
    world.add_sound("five.wav", 5.0)
    world.add_sound("short.wav", 0.5)
    world.configure("audio_directory")
    assert world.run(mode="av") == 0  # switches to audio
    assert world.names() == ["five_ltx2", "five_ltx2_audio", "short_ltx2", "short_ltx2_audio"]
    placeholder = read_latents(next(world.cache.glob("five_*_ltx2.safetensors")))
    assert placeholder.latents.shape == (8, 1, 1, 1)
    assert not placeholder.latents.any()
    assert placeholder.virtual == (16, 2, 2)
    assert placeholder.metadata["frame_count"] == "121"
    assert read_audio(next(world.cache.glob("five_*_audio.safetensors"))).length == 126
    before = digests(world.cache)
    assert world.run("--skip_existing", mode="audio") == 0
    assert digests(world.cache) == before
    world.run("--audio_only_sequence_resolution", 0, mode="audio")
    assert read_latents(next(world.cache.glob("five_*_ltx2.safetensors"))).virtual == (16, 2, 3)


def test_references(world, capsys):
    world.add_clip("a.mp4", 20)
    world.add_clip("b.mp4", 20)
    references = World(world.folder / "references", world.checkpoint)
    references.add_clip("a.mp4", 3, seconds=0.5)
    world.configure(
        target_frames=[9],
        reference_directory=references.clips,
        reference_cache_directory=world.folder / "reference cache",
        reference_frames=5,
    )
    assert world.run() == 0
    output = capsys.readouterr().out
    assert "Reference: encoded 1, failed 0" in output
    assert "missing_reference: b.mp4" in output
    (path,) = (world.folder / "reference cache").iterdir()
    cached = read_latents(path)
    assert path.name == "a_00000-009_0096x0064_ltx2.safetensors"
    assert cached.latents.shape[1:] == (2, 2, 3)  # 5 frames are padded to 9
    assert cached.metadata["frame_count"] == "5"
    assert cached.metadata["reference_downscale"] == "1"


def test_reference_sound_is_whole_for_every_crop(world):
    world.add_clip("a.mp4", 25, seconds=1.0)
    voices = World(world.folder / "voices", world.checkpoint)
    voices.add_sound("a.wav", 2.0)
    cache = world.folder / "voice cache"
    world.configure(
        target_frames=[9],
        frame_extraction="chunk",
        reference_audio_directory=voices.clips,
        reference_audio_cache_directory=cache,
    )
    assert world.run(mode="av") == 0
    files = sorted(cache.iterdir())
    assert len(files) == 2
    first, second = (read_audio(path) for path in files)
    assert first.length == 51
    assert torch.equal(first.latents, second.latents)


def test_latents_that_are_not_finite_fail_their_item(world, capsys, monkeypatch):
    from ltx2_tuner.caching.encoders import VideoLatents

    world.add_clip("a.mp4")
    world.add_clip("b.mp4")
    world.configure(target_frames=[9])
    encode, calls = VideoLatents.encode, []

    def poisoned(self, clips):
        calls.append(1)
        latents = encode(self, clips)
        return [latent * np.nan for latent in latents] if len(calls) == 1 else latents

    monkeypatch.setattr(VideoLatents, "encode", poisoned)
    assert world.run() == 0
    assert "encoded 1 | skipped (existing) 0 | failed 1" in capsys.readouterr().out
    assert world.names() == ["b_00000-009_ltx2"]


def test_blank_clips_are_pointed_out(world, capsys):
    make_clip(world.clips / "black.mp4", np.zeros((10, 64, 96, 3), np.uint8))
    (world.clips / "black.txt").write_text("nothing")
    world.add_clip("good.mp4")
    world.configure(target_frames=[9])
    world.run()
    assert "[Dataset 0] blank picture: black_00000-009\n" in capsys.readouterr().out


def test_a_full_disk_stops_the_run_and_the_next_goes_on(world, capsys, monkeypatch):
    from ltx2_tuner.caching import pictures

    for name in "abc":
        world.add_clip(f"{name}.mp4")
    world.configure(target_frames=[9])
    assert world.run() == 0
    whole = digests(world.cache)
    for path in world.cache.glob("*_ltx2.safetensors"):
        path.unlink()
    write, room = pictures.write_latents, [1]

    def full(path, *arguments):
        if not room:
            raise UserError(f"{path}: no space left on the disk; free some and run the command again")
        room.pop()
        write(path, *arguments)

    monkeypatch.setattr(pictures, "write_latents", full)
    assert world.run() == 1
    assert "no space left on the disk" in capsys.readouterr().err
    monkeypatch.undo()
    assert world.run() == 0
    assert "encoded 2 | skipped (existing) 1" in capsys.readouterr().out
    assert digests(world.cache) == whole


def test_conditioning_of_sample_prompts(world):
    """Reference videos belong to mode video, reference sound to the modes with sound."""
    clip = world.add_clip("a.mp4", 20, seconds=0.8)
    world.configure(target_frames=[9])
    prompts = world.folder / "prompts.txt"
    prompts.write_text(f"a cat\na dog --w 64 --h 64 --v {clip} --ra {clip}\n", encoding="utf-8")
    shapes = {"video": ("v2v_ref", (1, 8, 1, 2, 2)), "av": ("ref_audio", (1, 2, None, 16))}
    for mode, (kind, shape) in shapes.items():
        assert world.run("--precache_sample_latents", "--sample_prompts", prompts, mode=mode) == 0
        cached = torch.load(world.cache / "ltx2_sample_latents_cache.pt", weights_only=True)
        (entry,) = cached["latent_cache"]
        assert (cached["version"], entry["prompt_index"], entry["width"], entry["height"]) == (1, 1, 64, 64)
        found = entry[f"{kind}_latent"].shape
        assert len(found) == len(shape)
        assert all(wanted in (None, size) for wanted, size in zip(shape, found))
        assert entry[f"{kind}_path"] == str(clip)
        assert sum(key.endswith("_latent") for key in entry) == 1


def test_the_manifest_names_the_caches(world):
    world.add_clip("a.mp4")
    world.configure(target_frames=[9])
    manifest = world.folder / "manifest.json"
    assert world.run("--save_dataset_manifest", manifest) == 0
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content["datasets"][0]["params"]["cache_directory"] == str(world.cache)
    assert content["component_ids"]["video_encoder"] == world.metadata("a_*")["component_id"]
