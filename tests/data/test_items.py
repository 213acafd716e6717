from __future__ import annotations

import logging
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

from ltx2_tuner.data.companions import SoundFinder
from ltx2_tuner.data.config import Dataset, load_dataset_config
from ltx2_tuner.data.items import list_items
from ltx2_tuner.data.probing import Measured, probe_clip
from ltx2_tuner.errors import UserError
from ltx2_tuner.media.errors import MediaError

CLIPS: dict[str, Measured] = {}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CLIPS.clear()


def probe(path: Path, limit) -> Measured:
    """Stands in for decoding: counts no further than asked, as the real one."""
    if path.name not in CLIPS:
        raise MediaError(f"{path}: cannot be decoded")
    clip = CLIPS[path.name]
    wanted = limit(clip.fps)
    return Measured(clip.size, min(clip.frames, wanted or clip.frames), clip.fps, clip.is_vfr)


def clip(name: str, frames: int = 40, fps: float | None = 25.0, size=(1920, 1080), is_vfr=False) -> None:
    path = Path("v") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    path.with_suffix(".txt").write_text(f"about {path.stem}", encoding="utf-8")
    CLIPS[name] = Measured(size, frames, fps, is_vfr)


def picture(path: str, size=(64, 48)) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def dataset(body: str = "", mode: str = "video", source: str = "video_directory = 'v'") -> Dataset:
    text = f"[[datasets]]\n{source}\ncache_directory = 'cache'\nresolution = [768, 512]\n{body}"
    Path("d.toml").write_text(text, encoding="utf-8")
    return load_dataset_config("d.toml", mode).datasets[0]


def listed(body: str = "", mode: str = "video", **options):
    return list_items(dataset(body, mode), probe=probe, **options)


def test_items_of_a_clip():
    clip("a b.mp4")
    items = listed("enable_bucket = true\ntarget_frames = [1, 17, 33]\nframe_extraction = 'chunk'").items
    item = next(item for item in items if item.start == 17 and item.frames == 17)
    assert item.key == "a b_00017-017"
    assert (item.stem, item.caption, item.kind) == ("a b", "about a b", "video")
    assert item.bucket == item.name_size == (800, 480)
    assert item.source_size == (1920, 1080)
    assert item.latent_path == Path("cache/a b_00017-017_0800x0480_ltx2.safetensors")
    assert item.audio_path == Path("cache/a b_00017-017_0800x0480_ltx2_audio.safetensors")
    assert item.dino_path == Path("cache/a b_00017-017_0800x0480_ltx2_dino.safetensors")
    assert item.text_path == Path("cache/a b_ltx2_te.safetensors")
    assert item.sound is None and item.reference_path is None
    assert item.source_frames == list(range(17, 34))


def test_windows_count_output_frames():
    clip("a.mp4", frames=96, fps=60.0)
    item = listed("target_frames = [17, 33]").items[1]
    assert (item.start, item.frames) == (0, 33)
    assert item.source_frames[:5] == [0, 3, 5, 8, 10]
    assert item.sound_span == pytest.approx((0.0, 33 / 25))


def test_sound_of_a_clip_that_is_not_resampled_is_cut_by_its_own_clock():
    clip("a.mp4", frames=40, fps=24.0)
    item = listed("target_frames = [17]\nframe_extraction = 'chunk'").items[1]
    assert item.sound_span == pytest.approx((17 / 24, 34 / 24))
    assert item.rate.stretch == pytest.approx(0.96)


def test_head_looks_no_further_than_needed():
    clip("a.mp4", frames=10_000, fps=60.0)
    CLIPS["a.mp4"] = Measured((1920, 1080), 10_000, 60.0)
    seen = []

    def counting(path, limit):
        seen.append(limit(60.0))
        return probe(path, limit)

    list_items(dataset("target_frames = [1, 33]"), probe=counting)
    list_items(dataset("frame_extraction = 'full'\nmax_frames = 9"), probe=counting)
    list_items(dataset("frame_extraction = 'slide'\nframe_stride = 5000"), probe=counting)
    assert seen == [78, 21, None]  # frame 32 of the output is frame 77 of the source


def test_source_fps_overrides_the_file(caplog):
    caplog.set_level(logging.INFO)
    clip("a.mp4", frames=96, fps=25.0)
    found = listed("source_fps = 50\nframe_extraction = 'full'")
    assert found.items[0].frames == 41  # 96 frames at 50 fps are 48 at 25
    assert "Auto-detected" not in caplog.text and "Resampling a.mp4: 50.00 FPS -> 25.00 FPS" in caplog.text


def test_log_lines_of_a_resampled_clip(caplog):
    caplog.set_level(logging.INFO)
    clip("a.mp4", frames=240, fps=60.0)
    found = listed("frame_extraction = 'full'\nmax_frames = 129")
    assert "Auto-detected source FPS: 60.00 for a.mp4" in caplog.messages
    assert "Resampling a.mp4: 60.00 FPS -> 25.00 FPS" in caplog.messages
    assert "a.mp4: 240 -> 100 frames" in caplog.messages
    assert found.lost_frames == ["a.mp4"]


def test_a_higher_target_rate_repeats_frames_with_a_warning(caplog):
    clip("a.mp4", frames=24, fps=24.0)
    item = listed("target_fps = 60\nframe_extraction = 'full'").items[0]
    assert item.frames == 57
    assert item.source_frames[:4] == [0, 0, 0, 1]
    assert caplog.text.count("frames are repeated") == 1


def test_short_damaged_and_odd_clips_are_counted(caplog):
    clip("good.mp4")
    clip("short.mp4", frames=9)
    clip("odd.mp4", is_vfr=True)
    clip("broken.mp4")
    del CLIPS["broken.mp4"]
    found = listed("target_frames = [17, 121]\nframe_extraction = 'chunk'")
    assert {item.stem for item in found.items} == {"good", "odd"}
    assert found.too_short == [("short.mp4", 9)]
    assert [failure.name for failure in found.failures] == ["broken.mp4"]
    assert found.vfr == ["odd.mp4"]
    assert "odd.mp4: looks like variable frame rate; set source_fps" in caplog.text
    assert "no clip has ≥ 121 frames" in caplog.text


def test_strong_crops_are_warned_about(caplog):
    clip("a.mp4", size=(1000, 100))
    found = listed()
    assert "cropping 1000x100 to 768x512 cuts" in caplog.text
    assert found.crops[(768, 512)][0] > 0.8


def test_a_source_that_is_too_small_is_a_failure():
    clip("a.mp4", size=(20, 200))
    found = listed("enable_bucket = true\nbucket_no_upscale = true")
    assert not found.items and "smaller than 32 px" in found.failures[0].reason


def test_images_are_named_after_their_own_size():
    picture("p/x.png", (640, 480))
    Path("p/x.txt").write_text("x", encoding="utf-8")
    item = list_items(dataset(source="image_directory = 'p'", body="enable_bucket = true")).items[0]
    assert item.latent_path.name == "x_0640x0480_ltx2.safetensors"
    assert (item.bucket, item.frames, item.kind) == ((704, 544), 1, "image")


def test_pictures_in_a_video_folder_are_one_frame_clips():
    clip("a.mp4")
    picture("v/still.png")
    Path("v/still.txt").write_text("s", encoding="utf-8")
    found = listed("target_frames = [1, 17]")
    assert [item.key for item in found.items] == ["a_00000-001", "a_00000-017", "still_00000-001"]


def test_folders_of_frames_have_no_rate_unless_one_is_set():
    for number in range(20):
        picture(f"frames/{number:02d}.png")
    Path("l.jsonl").write_text('{"video_path": "frames", "caption": ""}', encoding="utf-8")
    source = "video_jsonl_file = 'l.jsonl'"
    item = list_items(dataset("frame_extraction = 'full'", source=source)).items[0]
    assert (item.frames, item.rate.source) == (17, None)
    item = list_items(dataset("frame_extraction = 'full'\nsource_fps = 50", source=source)).items[0]
    assert (item.frames, item.source_frames[:3]) == (9, [0, 2, 4])


def test_sound_datasets():
    Path("s").mkdir()
    Path("s/a.b.wav").write_bytes(b"")
    Path("s/a.b.txt").write_text("x", encoding="utf-8")
    item = list_items(dataset(mode="audio", source="audio_directory = 's'"), sound=SoundFinder()).items[0]
    assert (item.key, item.kind, item.sound) == ("a.b", "audio", Path("s/a.b.wav"))
    assert item.latent_path.name == "a.b_0768x0512_ltx2.safetensors"


def test_clips_are_sound_items_in_audio_mode():
    clip("a.mp4")
    Path("rs").mkdir()
    Path("rs/a.wav").write_bytes(b"")
    body = "reference_audio_directory = 'rs'\nreference_audio_cache_directory = 'rc'"
    item = listed(body, "audio", sound=SoundFinder()).items[0]
    assert (item.key, item.kind, item.sound) == ("a", "audio", Path("v/a.mp4"))
    assert item.reference_audio_path == Path("rc/a_0768x0512_ltx2_audio.safetensors")


# Companions


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")


def test_sound_files_are_found_by_the_stem_of_the_source():
    clip("a.mp4")
    clip("b.mp4")
    clip("c.mp4")
    clip("d.mp4")
    touch("v/a.flac", "v/a.ogg", "v/B.WAV", "other/c.wav")
    finder = SoundFinder(external=True, extension=".ogg")
    found = {item.stem: item.sound for item in listed("target_frames = [1, 17]", "av", sound=finder).items}
    assert found == {"a": Path("v/a.ogg"), "b": Path("v/B.WAV"), "c": None, "d": None}
    finder = SoundFinder(external=True, directory=Path("other"))
    assert [item.sound for item in listed(mode="av", sound=finder).items] == [None, None, Path("other/c.wav"), None]


def test_the_track_of_the_clip_is_the_default():
    clip("a.mp4")
    picture("v/still.png")
    Path("v/still.txt").write_text("s", encoding="utf-8")
    assert [item.sound for item in listed(mode="av", sound=SoundFinder()).items] == [Path("v/a.mp4"), None]


REFERENCES = "reference_directory = 'refs'\nreference_cache_directory = 'rc'\n"


def test_references_are_paired_by_stem(caplog):
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"):
        clip(name)
    touch("refs/a.mp4", "refs/a.png", "refs/B.JPG", "refs/d_1.png")
    picture("refs/c/1.png")
    found = listed(REFERENCES)
    assert {item.stem: item.reference and item.reference.name for item in found.items} == {
        "a": "a.png",
        "b": "B.JPG",
        "c": "c",
        "d": None,
        "e": None,
    }
    assert "several files for 'a'" in caplog.text
    assert found.missing_reference == ["d.mp4", "e.mp4"]
    assert "missing_reference 2, skipped at training: d.mp4, e.mp4" in caplog.text
    assert found.items[0].reference_path == Path("rc/a_00000-001_0768x0512_ltx2.safetensors")


def test_the_nearest_name_is_shown_for_a_missing_reference(caplog):
    for name in ("scene_01.mp4", "scene_02.mp4"):
        clip(name)
    touch("refs/scene_01.png", "refs/scene_2.png")
    assert listed(REFERENCES).missing_reference == ["scene_02.mp4"]
    assert "scene_02.mp4 (nearest: scene_2.png)" in caplog.text


def test_no_reference_at_all_is_an_error():
    clip("a.mp4")
    touch("refs/other.png")
    with pytest.raises(UserError, match="not one of 1 sources has a file of the same stem in refs"):
        listed(REFERENCES)


def test_downscaled_references():
    clip("a.mp4")
    touch("refs/a.png")
    found = list_items(dataset(REFERENCES + "enable_bucket = true"), probe=probe, reference_downscale=2)
    assert found.items[0].bucket == (832, 448)
    assert found.items[0].reference_bucket == (416, 224)


def test_records_name_their_own_references():
    clip("a.mp4")
    clip("b.mp4")
    touch("x/ref.png", "x/voice.wav", "refs/b.png")
    Path("l.jsonl").write_text(
        '{"video_path": "v/a.mp4", "caption": "", '
        '"reference_path": "x/ref.png", "reference_audio_path": "x/voice.wav"}\n'
        '{"video_path": "v/b.mp4", "caption": "", "reference_path": "x/gone.png"}',
        encoding="utf-8",
    )
    body = "reference_cache_directory = 'rc'\nreference_audio_cache_directory = 'rs'"
    found = list_items(dataset(body, source="video_jsonl_file = 'l.jsonl'"), probe=probe)
    first, second = found.items
    assert (first.reference, first.reference_audio) == (Path("x/ref.png"), Path("x/voice.wav"))
    assert second.reference is None and second.reference_audio is None
    assert found.missing_reference == found.missing_reference_audio == ["b.mp4"]


def test_clips_are_looked_into_by_other_processes():
    """The default probe and everything it needs travel to spawned workers."""
    clip("not a clip.mp4")
    with get_context("spawn").Pool(1) as pool:
        found = list_items(dataset(), probe=probe_clip, map_with=pool.imap)
    assert [failure.name for failure in found.failures] == ["not a clip.mp4"]
