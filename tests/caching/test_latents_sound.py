"""Sound of every container, layout and rate through the caching script, in modes audio and av."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ltx2_tuner.data.cache_files import read_audio
from tests.caching.latents_world import World
from tests.media.zoo import has_encoder, make_clip, make_sound, numbered_frames, tone

# name, codec, rate, channels, layout. Encoders that a build lacks are left out; the readers are always there.
SOUNDS = (
    ("a.wav", "pcm_s16le", 44100, 2, "stereo"),
    ("b.wav", "pcm_f32le", 48000, 1, "mono"),
    ("c.wav", "pcm_s16le", 8000, 1, "mono"),
    ("d.wav", "pcm_s24le", 96000, 2, "stereo"),
    ("e.wav", "pcm_s16le", 48000, 6, "5.1"),
    ("f.flac", "flac", 22050, 2, "stereo"),
    ("g.mp3", "libmp3lame", 44100, 2, "stereo"),
    ("h.m4a", "aac", 48000, 6, "5.1"),
    ("i.aac", "aac", 44100, 2, "stereo"),
    ("j.opus", "libopus", 48000, 2, "stereo"),
    ("k.ogg", "libvorbis", 48000, 2, "stereo"),
    ("l.aiff", "pcm_s16be", 44100, 2, "stereo"),
    ("m.mka", "flac", 48000, 2, "stereo"),
    ("n.ac3", "ac3", 48000, 6, "5.1"),
    ("o.mp2", "mp2", 44100, 2, "stereo"),
    ("p.wv", "wavpack", 44100, 2, "stereo"),
    ("q.caf", "pcm_s16be", 44100, 2, "stereo"),
    ("r.au", "pcm_s16be", 44100, 2, "stereo"),
    ("s.tta", "tta", 44100, 2, "stereo"),
)
SECONDS = 1.5
STEPS = 38  # 24000 samples at 16 kHz are 151 mel frames, four a step


@pytest.fixture
def world(tmp_path, checkpoint) -> World:
    return World(tmp_path, checkpoint)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tiny")).checkpoint


def lengths(world: World) -> dict[str, int]:
    return {path.name.split("_")[0]: read_audio(path).length for path in world.cache.glob("*_ltx2_audio.safetensors")}


def test_every_format_of_a_folder(world, capsys):
    """Also clips, for their sound; those beside a sound file of the same name are left alone."""
    made = [sound for sound in SOUNDS if has_encoder(sound[1])]
    assert len(made) >= 15
    for name, codec, rate, channels, layout in made:
        path = make_sound(world.clips / name, tone(rate, SECONDS, channels), rate, codec, layout)
        path.with_suffix(".txt").write_text("a hum")
    world.add_clip("y.mp4", 38, seconds=SECONDS)
    world.add_clip("z.mp4", 10)
    world.add_clip("a.mp4", 10, seconds=0.4)
    world.configure("audio_directory")
    assert world.run(mode="audio") == 0
    assert f"Audio: encoded {len(made) + 1}, failed 0, no audio 1, silent 0" in capsys.readouterr().out
    found = lengths(world)
    assert set(found) == {sound[0][0] for sound in made} | {"y"}
    # Formats whose header does not tell the encoder's delay keep it: a raw AAC stream is up to two blocks longer.
    assert {name: steps for name, steps in found.items() if abs(steps - STEPS) > (2 if name == "i" else 1)} == {}


def test_a_list_of_any_formats(world):
    paths = [
        make_sound(world.clips / "a.mka", tone(22050, SECONDS, 1), 22050, "flac", "mono"),
        make_clip(world.clips / "b.mp4", numbered_frames(38), sound=tone(48000, SECONDS)),
    ]
    listed = world.folder / "list.jsonl"
    records = [json.dumps({"audio_path": str(path), "caption": path.stem}) for path in paths]
    listed.write_text("\n".join(records), encoding="utf-8")
    world.config.write_text(
        f"[[datasets]]\naudio_jsonl_file = '{listed}'\ncache_directory = '{world.cache}'\n", encoding="utf-8"
    )
    assert world.run(mode="audio") == 0
    assert lengths(world) == {"a": STEPS, "b": STEPS}


def test_damaged_sound_is_named_and_the_others_go_on(world, capsys):
    world.add_sound("good.wav", 1.0)
    cut = world.add_sound("cut.wav", 1.0)
    cut.write_bytes(cut.read_bytes()[:9000])
    (world.clips / "empty.mp3").write_bytes(b"")
    (world.clips / "empty.txt").write_text("nothing")
    world.configure("audio_directory")
    assert world.run(mode="audio") == 1, "a sound that was lost is never a success"
    output = capsys.readouterr().out
    assert "Audio: encoded 1, failed 2, no audio 0" in output
    assert "cut: " in output and "empty: " in output and "failed 2" in output.splitlines()[-1]
    assert lengths(world) == {"good": 26}


def test_sound_lost_from_a_clip_that_has_some_fails_the_run(world, capsys):
    """The picture is cached, yet nobody should find out at the end of training that the voice was not."""
    sound = tone(48000, 1.0)
    sound[:, 1000] = np.nan
    path = make_clip(world.clips / "a.mkv", numbered_frames(25), sound=sound, sound_codec="pcm_f32le")
    path.with_suffix(".txt").write_text("x")
    world.configure(target_frames=[17])
    assert world.run(mode="av") == 1
    output = capsys.readouterr().out
    assert "encoded 1 | skipped (existing) 0 | failed 0" in output and "Audio: encoded 0, failed 1" in output
    assert "not finite" in output


@pytest.mark.parametrize("source", ["video_directory", "audio_directory"])
def test_the_wanted_peak_is_part_of_the_fingerprint(world, capsys, source):
    mode = "av" if source == "video_directory" else "audio"
    if mode == "av":
        world.add_clip("a.mp4", 25, seconds=1.0)
    else:
        world.add_sound("a.wav", 1.0)
    options = {"target_frames": [17]} if mode == "av" else {}
    world.configure(source, **options)
    world.run(mode=mode)
    (path,) = world.cache.glob("a*_ltx2_audio.safetensors")
    plain = read_audio(path).latents
    capsys.readouterr()
    world.run("--skip_existing", mode=mode)
    assert "Audio: encoded 0" in capsys.readouterr().out
    world.configure(source, audio_peak_db=-20.0, **options)
    world.run("--skip_existing", mode=mode)
    assert "Audio: encoded 1" in capsys.readouterr().out
    quiet = read_audio(path)
    assert '"audio_peak_db":-20.0' in quiet.metadata["preprocess"].replace(" ", "")
    assert not torch.equal(plain, quiet.latents)


def test_unusual_stretching_is_a_warning(world, caplog):
    world.add_clip("usual.mp4", 24, rate=24, seconds=1.0)
    world.configure(target_frames=[17])
    with caplog.at_level("INFO"):
        world.run(mode="av")
    told = [record for record in caplog.records if "is stretched to" in record.message]
    assert [record.levelname for record in told] == ["INFO"]
    assert "usual.mp4: sound is stretched to 0.960 of its length, with its pitch kept" in told[0].message
    caplog.clear()
    world.add_clip("odd.mp4", 18, rate=9, seconds=2.0)
    world.configure(target_frames=[9], target_fps=8.0)
    world.run(mode="av")
    told = [record for record in caplog.records if "odd.mp4: sound is stretched to 1.125" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]


@pytest.mark.parametrize(
    ("flags", "virtual", "frames"),
    [
        ((), (16, 2, 2), 121),
        (("--audio_only_sequence_resolution", 128), (16, 4, 4), 121),
        (("--audio_only_sequence_resolution", 0), (16, 2, 3), 121),
        (("--audio_only_sequence_resolution", 0, "--audio_only_target_resolution", 256), (16, 8, 8), 121),
        (("--audio_only_target_fps", 10), (7, 2, 2), 49),
    ],
)
def test_geometry_of_a_picture_that_is_not_there(world, flags, virtual, frames):
    from ltx2_tuner.data.cache_files import read_latents

    world.add_sound("five.wav", 5.0)
    world.configure("audio_directory")
    assert world.run(*flags, mode="audio") == 0
    (path,) = world.cache.glob("five_*_ltx2.safetensors")
    placeholder = read_latents(path)
    assert placeholder.virtual == virtual
    assert placeholder.metadata["frame_count"] == str(frames)


def test_sound_files_instead_of_the_clips_own_track(world):
    """In the folder of the clips or another, the wanted extension first, else any, by the clip's stem in any case."""
    for name in ("a", "b", "c"):
        world.add_clip(f"{name}.mp4", 50, seconds=2.0)
    for name, seconds, rate, codec in (
        ("a.wav", 0.4, 16000, "pcm_s16le"),
        ("a.flac", 0.8, 44100, "flac"),
        ("B.wav", 1.2, 8000, "pcm_s16le"),
    ):
        make_sound(world.clips / name, tone(rate, seconds, 1), rate, codec, "mono")
    world.configure(target_frames=[49])
    assert world.run("--ltx2_audio_source", "audio_files", "--ltx2_audio_ext", ".flac", mode="av") == 0
    assert lengths(world) == {"a": 21, "b": 31}
    world.run("--ltx2_audio_source", "audio_files", mode="av")
    assert lengths(world) == {"a": 11, "b": 31}
    other = world.folder / "other sounds"
    other.mkdir()
    make_sound(other / "c.flac", tone(44100, 0.8, 1), 44100, "flac", "mono")
    world.run("--ltx2_audio_source", "audio_files", "--ltx2_audio_dir", other, mode="av")
    assert set(lengths(world)) == {"c"}


def test_a_list_names_the_sound_of_a_clip(world):
    world.add_clip("a.mp4", 50, seconds=2.0)
    sound = make_sound(world.folder / "elsewhere.wav", tone(16000, 0.8, 1), 16000, "pcm_s16le", "mono")
    listed = world.folder / "list.jsonl"
    record = {"video_path": str(world.clips / "a.mp4"), "caption": "x", "audio_path": str(sound)}
    listed.write_text(json.dumps(record), encoding="utf-8")
    world.config.write_text(
        f"[[datasets]]\nresolution = [96, 64]\nvideo_jsonl_file = '{listed}'\ncache_directory = '{world.cache}'\n"
        "target_frames = [49]\n",
        encoding="utf-8",
    )
    assert world.run(mode="av") == 0
    assert lengths(world) == {"a": 21}
