from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ltx2_tuner.data.config import load_dataset_config
from ltx2_tuner.errors import UserError


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A working directory with one folder of each kind of source."""
    for name in ("pics", "videos", "more videos", "sounds", "refs", "ref_sounds"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def load(text: str, mode: str = "video", **options):
    path = Path("dataset.toml")
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path, mode, **options)


def problems(text: str, mode: str = "video", **options) -> str:
    with pytest.raises(UserError) as caught:
        load(text, mode, **options)
    return str(caught.value)


GUIDE = """
[general]
resolution = [768, 512]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
cache_directory = "cache"
[[datasets]]
video_directory = "videos"
target_frames = [1, 17, 33, 49]
target_fps = 25
source_fps = 30
"""


def test_the_example_of_the_user_guide():
    dataset = load(GUIDE).datasets[0]
    assert dataset.kind == dataset.item_kind == "video"
    assert dataset.resolution == (768, 512)
    assert dataset.target_frames == (1, 17, 33, 49)
    assert (dataset.target_fps, dataset.source_fps) == (25.0, 30.0)
    assert dataset.cache_directory == Path("cache")
    assert (dataset.frame_extraction, dataset.max_frames) == ("head", 129)
    assert dataset.video_loss_weight is None


def test_json_and_a_byte_order_mark_are_read():
    Path("d.json").write_text(json.dumps({"datasets": [{"image_directory": "pics"}]}), encoding="utf-8-sig")
    dataset = load_dataset_config("d.json", "video").datasets[0]
    assert (dataset.kind, dataset.resolution) == ("image", (960, 544))
    assert dataset.cache_directory == Path("pics")


def test_all_problems_of_a_file_are_reported_together():
    text = """
[general]
resolutio = [768, 512]
batch_size = true
[extra]
[[datasets]]
image_directory = "pics"
target_frames = [1]
num_repeats = 0
[[datasets]]
video_directory = "videos"
image_directory = "pics"
[[datasets]]
cache_directory = "x"
[[validation_datasets]]
video_directory = "nowhere"
cache_directory = "c"
enable_bucket = true
frame_extraction = "tail"
"""
    assert problems(text) == (
        "dataset.toml: 9 problems to fix\n"
        "  unknown top-level key 'extra'\n"
        "  general: unknown key 'resolutio' (did you mean 'resolution'?)\n"
        "  general: 'batch_size' must be an integer of at least 1, not true\n"
        "  datasets[0]: 'num_repeats' must be an integer of at least 1, not 0\n"
        "  datasets[0]: 'target_frames' is an option of video datasets but this is an image dataset\n"
        "  datasets[1]: several sources (image_directory, video_directory); keep one\n"
        "  datasets[2]: no source; add one of image_directory, image_jsonl_file, video_directory, video_jsonl_file, "
        "audio_directory, audio_jsonl_file\n"
        "  validation_datasets[0]: 'frame_extraction' must be one of head, chunk, slide, uniform, full, not \"tail\"\n"
        "  validation_datasets[0]: source directory 'nowhere' does not exist"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size = true", "an integer of at least 1, not true"),
        ("batch_size = 1.0", "an integer of at least 1, not 1.0"),
        ("enable_bucket = 1", "true or false, not 1"),
        ("target_fps = 0", "a number above 0, not 0"),
        ("target_fps = inf", "a number above 0"),
        ("target_fps = true", "a number above 0, not true"),
        ("target_fps = '25'", "a number above 0"),
        ("target_frames = []", "a non-empty list"),
        ("target_frames = 33", "a non-empty list"),
        ("target_frames = [1, true]", "a list of integers"),
        ("resolution = [768]", "each at least 64 pixels"),
        ("resolution = [768, 32]", "each at least 64 pixels"),
        ("resolution = 512.0", "each at least 64 pixels"),
        ("audio_peak_db = 1", "at most 0"),
        ("video_loss_weight = -1", "at least 0"),
        ("caption_extension = '../txt'", "a file extension such as .txt"),
        ("caption_extension = ''", "a non-empty string"),
        ('cache_directory = "a\\u0000b"', "without control characters"),
        ('reference_audio_directory = "a\\nb"', "without control characters"),
        ("cache_directory = 3", "a non-empty string, not 3"),
    ],
)
def test_types_are_strict(line, message):
    found = problems(f"[[datasets]]\nvideo_directory = 'videos'\n{line}\n")
    assert f"datasets[0]: '{line.split(' ')[0]}' must be" in found
    assert message in found


def test_hostile_source_names_are_refused():
    assert "without control characters" in problems('[[datasets]]\nvideo_directory = "vid\\u0000eos"\n')


@pytest.mark.parametrize(("value", "expected"), [("512", (512, 512)), ("[768, 512]", (768, 512))])
def test_resolution_forms(value, expected):
    assert load(f"[[datasets]]\nvideo_directory = 'videos'\nresolution = {value}\n").datasets[0].resolution == expected


def test_integers_are_accepted_for_numbers():
    dataset = load("[[datasets]]\nvideo_directory = 'videos'\nsource_fps = 30\n").datasets[0]
    assert dataset.source_fps == 30.0 and isinstance(dataset.source_fps, float)


def test_dataset_wins_over_general_over_typed_flag_over_default():
    text = """
[general]
separate_audio_buckets = true
video_loss_weight = 0.5
[[datasets]]
video_directory = 'videos'
cache_directory = 'a'
video_loss_weight = 0.25
[[datasets]]
video_directory = 'more videos'
cache_directory = 'b'
"""
    typed = {"video_loss_weight": 3.0, "audio_loss_weight": 2.0, "separate_audio_buckets": False, "caption_field": None}
    first, second = load(text, typed=typed).datasets
    assert (first.video_loss_weight, second.video_loss_weight) == (0.25, 0.5)
    assert first.audio_loss_weight == 2.0
    assert first.separate_audio_buckets is True
    assert first.caption_field == "caption"


def test_flags_cannot_set_what_only_the_file_may_set():
    assert load("[[datasets]]\nvideo_directory = 'videos'\n", typed={"batch_size": 7}).datasets[0].batch_size == 1


def test_general_options_of_another_kind_are_ignored():
    text = "[general]\ntarget_frames = [9]\n[[datasets]]\nimage_directory = 'pics'\n"
    assert load(text).datasets[0].target_frames == (1,)


def test_sources_do_not_belong_in_general():
    text = "[general]\nvideo_directory = 'videos'\n[[datasets]]\nimage_directory = 'pics'\n"
    assert "'video_directory' belongs in a [[datasets]] entry" in problems(text)


def test_target_frames_are_rounded_sorted_and_told(caplog):
    dataset = load("[[datasets]]\nvideo_directory = 'videos'\ntarget_frames = [50, 20, 17, 8]\n").datasets[0]
    assert dataset.target_frames == (1, 17, 49)
    assert "[50, 20, 17, 8] became [1, 17, 49]" in caplog.text


def test_keys_of_other_models_are_ignored_with_one_warning(caplog):
    text = "[general]\nfp_1f_no_post = true\n[[datasets]]\nvideo_directory = 'videos'\nmultiple_target = true\n"
    load(text)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["dataset.toml: ignored, options of other models: fp_1f_no_post, multiple_target"]


@pytest.mark.parametrize("name", ["d.yaml", "d"])
def test_other_suffixes_are_refused(name):
    Path(name).write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"ends in \.toml or \.json"):
        load_dataset_config(name, "video")


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.toml", b"[[datasets]"), ("d.json", b"{"), ("d.toml", b"\xff\xfe"), ("d.json", b"[" * 9999)],
)
def test_files_that_are_no_toml_or_json(name, content):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_dataset_config(name, "video")


@pytest.mark.parametrize(
    "text", ["", "datasets = []", "datasets = 3", "[datasets]\nx = 1", "general = 1", "datasets = [1]"]
)
def test_files_without_datasets(text):
    assert "dataset.toml" in problems(text)


def test_a_missing_file():
    with pytest.raises(UserError, match="no such dataset file"):
        load_dataset_config("missing.toml", "video")


# Within one dataset

REFERENCE = "[[datasets]]\nvideo_directory = 'videos'\ncache_directory = 'cache'\n"


def test_a_reference_directory_needs_a_cache():
    assert "'reference_directory' needs 'reference_cache_directory'" in problems(
        REFERENCE + "reference_directory = 'refs'"
    )
    assert "needs 'reference_audio_cache_directory'" in problems(REFERENCE + "reference_audio_directory = 'ref_sounds'")


def test_two_different_reference_directories():
    text = REFERENCE + "reference_directory = 'refs'\ncontrol_directory = 'pics'\nreference_cache_directory = 'rc'"
    assert "differ; keep one" in problems(text)


def test_control_directory_is_an_alias():
    dataset = load(REFERENCE + "control_directory = 'refs'\nreference_cache_directory = 'rc'").datasets[0]
    assert dataset.reference_directory == Path("refs")
    assert dataset.has_reference_source


def test_control_directory_alone_is_ignored(caplog):
    dataset = load(REFERENCE + "control_directory = 'refs'").datasets[0]
    assert dataset.reference_directory is None
    assert "'control_directory' without 'reference_cache_directory' is ignored" in caplog.text


def test_a_reference_cache_without_a_source_is_noted_while_caching(caplog):
    caplog.set_level(logging.INFO)
    load(REFERENCE + "reference_cache_directory = 'rc'")
    assert "no reference source; reference caching skipped" in caplog.text


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("frame_stride = 2", "frame_stride"),
        ("frame_sample = 2", "frame_sample"),
        ("max_frames = 33", "max_frames"),
        ("frame_extraction = 'full'\ntarget_frames = [17]", "target_frames"),
        ("resolution = [768, 512]\nbucket_no_upscale = true", "bucket_no_upscale"),
    ],
)
def test_options_without_effect_are_noted(lines, key, caplog):
    caplog.set_level(logging.INFO)
    load(REFERENCE + lines)
    assert f"'{key}' has no effect" in caplog.text


def test_audio_buckets_are_tolerated_on_video_datasets(caplog):
    caplog.set_level(logging.INFO)
    load(REFERENCE + "audio_bucket_strategy = 'truncate'")
    assert "'audio_bucket_strategy' has no effect on video datasets" in caplog.text


def test_doubtful_extraction_is_warned_about(caplog):
    load(REFERENCE + "frame_extraction = 'uniform'")
    assert 'is the same as "head"' in caplog.text
    load(REFERENCE + "frame_extraction = 'chunk'")
    assert "makes every frame an item" in caplog.text


def test_a_resolution_that_is_no_multiple_of_the_step():
    message = problems(REFERENCE + "resolution = [770, 512]")
    assert "resolution width 770 is not a multiple of 32; use 768 or 800" in message
    assert load(REFERENCE + "resolution = [770, 512]\nenable_bucket = true").datasets


def test_downscaled_references_ask_for_a_larger_step():
    text = REFERENCE + "resolution = [768, 544]\nreference_directory = 'refs'\nreference_cache_directory = 'rc'"
    assert load(text).datasets
    assert "height 544 is not a multiple of 64; use 512 or 576" in problems(text, reference_downscale=2)


def test_too_small_for_bucketing():
    text = REFERENCE + (
        "resolution = 64\nenable_bucket = true\nreference_directory = 'refs'\nreference_cache_directory = 'rc'"
    )
    assert load(text).datasets
    assert "too small for bucketing" in problems(text, reference_downscale=2)


# Between datasets


def two(first: str, second: str, table: str = "datasets") -> str:
    return (
        f"[[datasets]]\nvideo_directory = 'videos'\n{first}\n[[{table}]]\nvideo_directory = 'more videos'\n{second}\n"
    )


@pytest.mark.parametrize("table", ["datasets", "validation_datasets"])
def test_cache_directories_are_not_shared(table):
    message = problems(two("cache_directory = 'c'", "cache_directory = './x/../c'", table))
    assert f"datasets[0], {table}[" in message and "share cache_directory" in message


def test_a_cache_directory_in_general_with_two_datasets():
    assert "share cache_directory" in problems("[general]\ncache_directory = 'c'\n" + two("", ""))


def test_reference_caches_are_not_shared_or_mixed_with_caches():
    refs = "reference_directory = 'refs'\nreference_cache_directory = "
    first = f"cache_directory = 'c'\n{refs}'rc'"
    assert "share reference_cache_directory" in problems(two(first, f"cache_directory = 'd'\n{refs}'rc'"))
    assert "is also the cache_directory of datasets[1]" in problems(two(first, "cache_directory = 'rc'"))


def test_reference_sound_may_lie_beside_reference_pictures_only():
    sound = "reference_audio_directory = 'ref_sounds'\nreference_audio_cache_directory = "
    picture = "reference_directory = 'refs'\nreference_cache_directory = 'rc'\n"
    assert load(REFERENCE + picture + sound + "'rc'").datasets
    assert "is also the cache_directory of datasets[0]" in problems(REFERENCE + sound + "'cache'")


def test_jsonl_datasets_need_a_cache_directory():
    Path("list.jsonl").write_text("", encoding="utf-8")
    assert "a JSONL dataset needs cache_directory" in problems("[[datasets]]\nvideo_jsonl_file = 'list.jsonl'\n")


def test_caches_in_a_foreign_source_folder_are_warned_about(caplog):
    load(two("cache_directory = 'c'", "cache_directory = 'videos'"))
    assert "writes caches into 'videos', the source of datasets[0]" in caplog.text


# Modes, places, purposes


def test_audio_datasets_switch_the_mode(caplog):
    caplog.set_level(logging.INFO)
    config = load("[[datasets]]\naudio_directory = 'sounds'\n", "video")
    assert config.mode == "audio"
    assert "becomes audio" in caplog.text


def test_audio_datasets_are_trained_alone():
    text = "[[datasets]]\naudio_directory = 'sounds'\n[[datasets]]\nvideo_directory = 'videos'\n"
    for mode in ("video", "av", "audio"):
        assert "audio datasets can only be trained alone, with --ltx2_mode audio" in problems(text, mode)


def test_audio_mode_takes_video_datasets_with_reference_sound():
    sound = "reference_audio_directory = 'ref_sounds'\nreference_audio_cache_directory = 'rs'"
    dataset = load(REFERENCE + sound, "audio").datasets[0]
    assert (dataset.kind, dataset.item_kind) == ("video", "audio")
    assert "must set reference_audio_directory" in problems(REFERENCE, "audio")
    assert "image datasets have no sound" in problems("[[datasets]]\nimage_directory = 'pics'\n", "audio")


def test_sources_are_looked_for_beside_the_file_too(tmp_path):
    (tmp_path / "sets" / "clips").mkdir(parents=True)
    path = tmp_path / "sets" / "d.toml"
    path.write_text("[[datasets]]\nvideo_directory = 'clips'\ncache_directory = 'cache'\n", encoding="utf-8")
    dataset = load_dataset_config(path, "video").datasets[0]
    assert dataset.source_directory == tmp_path / "sets" / "clips"
    assert dataset.cache_directory == Path("cache")


def test_training_does_without_the_sources(caplog):
    text = "[[datasets]]\nvideo_directory = 'gone'\ncache_directory = 'cache'\n"
    assert "source directory 'gone' does not exist" in problems(text)
    assert load(text, purpose="training").datasets
    assert "training reads the caches alone" in caplog.text
