from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from ltx2_tuner.data.config import Dataset, load_dataset_config
from ltx2_tuner.data.sources import list_sources, warn_shared_sources
from ltx2_tuner.errors import UserError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"caption of {path.stem}\n" if path.suffix == ".txt" else "", encoding="utf-8")


def dataset(body: str, mode: str = "video") -> Dataset:
    Path("d.toml").write_text(f"[[datasets]]\ncache_directory = 'cache'\n{body}", encoding="utf-8")
    return load_dataset_config("d.toml", mode).datasets[0]


def jsonl(*lines: object, kind: str = "video", extra: str = "", encoding: str = "utf-8") -> Dataset:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    Path("lists").mkdir(exist_ok=True)
    Path("lists/list.jsonl").write_text(text, encoding=encoding)
    return dataset(f"{kind}_jsonl_file = 'lists/list.jsonl'\n{extra}", "audio" if kind == "audio" else "video")


def test_files_are_taken_by_extension_and_sorted():
    touch("pics/b.PNG", "pics/b.txt", "pics/a.jpg", "pics/a.txt", "pics/.hidden.png", "pics/c.gif", "pics/sub/d.png")
    found = list_sources(dataset("image_directory = 'pics'"))
    assert [(source.stem, source.form, source.caption) for source in found.sources] == [
        ("a", "image", "caption of a"),
        ("b", "image", "caption of b"),
    ]


def test_folder_names_may_look_like_patterns():
    touch("p[1]*cs/a.png", "p[1]*cs/a.txt")
    assert len(list_sources(dataset("image_directory = 'p[1]*cs'")).sources) == 1


def test_pictures_in_a_video_folder_are_clips_unless_they_accompany_one(caplog):
    caplog.set_level(logging.INFO)
    touch("v/a.mp4", "v/a.txt", "v/a.png", "v/a.mp4.jpg", "v/b.png", "v/b.txt")
    found = list_sources(dataset("video_directory = 'v'"))
    assert [(source.path.name, source.form) for source in found.sources] == [("a.mp4", "video"), ("b.png", "image")]
    assert caplog.text.count("accompanies the clip") == 2


def test_captions():
    touch("pics/none.png", "pics/empty.png", "pics/lines.png", "pics/bad.png")
    Path("pics/empty.cap.txt").write_text(" \n", encoding="utf-8")
    Path("pics/lines.cap.txt").write_text("\n  one\ntwo  \n", encoding="utf-8-sig")
    Path("pics/bad.cap.txt").write_bytes(b"caf\xe9")
    found = list_sources(dataset("image_directory = 'pics'\ncaption_extension = 'cap.txt'"))
    assert [(source.stem, source.caption) for source in found.sources] == [("empty", ""), ("lines", "one\ntwo")]
    assert [path.name for path in found.no_caption] == ["none.png"]
    assert found.empty_caption == ("empty.png",)
    assert found.failures[0].name == "bad.png" and "not UTF-8" in found.failures[0].reason
    assert found.count == 4


def test_nothing_found():
    Path("v").mkdir()
    with pytest.raises(UserError, match=r"datasets\[0\]: found 0 video files in v; looked for \.mp4"):
        list_sources(dataset("video_directory = 'v'"))


def test_files_with_the_same_stem_are_an_error():
    touch("v/a.mp4", "v/a.mov", "v/a.txt")
    with pytest.raises(UserError, match=r"same stem .*a\.mov and .*a\.mp4"):
        list_sources(dataset("video_directory = 'v'"))


@pytest.mark.skipif(os.name == "nt", reason="such names do not exist on Windows")
def test_names_no_cache_file_can_have_are_failures():
    touch("v/a\\b.mp4", "v/a\\b.txt", "v/a\nb.mp4", "v/a\nb.txt")
    found = list_sources(dataset("video_directory = 'v'"))
    assert not found.sources
    assert all("rename the source" in failure.reason for failure in found.failures)


def test_names_too_long_for_cache_files_are_failures():
    name = "é" * 100
    touch(f"v/{name}.mp4", f"v/{name}.txt")
    assert "too long for cache files" in list_sources(dataset("video_directory = 'v'")).failures[0].reason


def test_shared_training_and_validation_files_are_warned_about(caplog):
    touch("v/a.mp4", "v/a.txt", "v/b.mp4", "v/b.txt")
    Path("d.toml").write_text(
        "[[datasets]]\nvideo_directory = 'v'\ncache_directory = 'c'\n"
        "[[validation_datasets]]\nvideo_directory = 'v'\ncache_directory = 'd'\n",
        encoding="utf-8",
    )
    config = load_dataset_config("d.toml", "video")
    warn_shared_sources((entry, list_sources(entry)) for entry in config.all)
    assert "validation_datasets[0]: 2 files are training files too" in caplog.text


# JSONL


def test_records():
    touch("v/a.mp4", "lists/b.mp4", "frames/1.png", "frames/2.png", "refs/r.png", "sounds/s.wav")
    found = list_sources(
        jsonl(
            {"video_path": "v/a.mp4", "caption": "one", "control_path": "refs/no.png", "reference_path": "refs/r.png"},
            "",
            "  # a comment",
            {"video_path": "b.mp4", "caption": None, "audio_path": "sounds/s.wav", "other": [1]},
            {"video_path": "frames", "caption": " kept as it is ", "reference_audio_path": "sounds/s.wav"},
            encoding="utf-8-sig",
        )
    )
    first, second, third = found.sources
    assert (first.stem, first.form, first.caption, first.reference) == ("a", "video", "one", Path("refs/r.png"))
    assert (second.path, second.caption, second.audio) == (Path("lists/b.mp4"), "", Path("sounds/s.wav"))
    assert (third.stem, third.form, third.caption) == ("frames", "frames", " kept as it is ")
    assert third.reference_audio == Path("sounds/s.wav")
    assert found.empty_caption == ("b.mp4",)


def test_absolute_paths_are_taken_as_they_are(tmp_path):
    touch("v/a.mp4")
    found = list_sources(jsonl({"video_path": str(tmp_path / "v/a.mp4"), "caption": ""}))
    assert found.sources[0].stem == "a"


def test_image_and_audio_records(caplog):
    touch("p/a.png", "s/a.wav")
    record = {"image_path_0": "p/a.png", "caption": "x", "control_path_0": "p/a.png", "image_path_1": "p/b.png"}
    assert list_sources(jsonl(record, kind="image")).sources[0].reference == Path("p/a.png")
    assert "only the first picture of a record is used" in caplog.text
    assert list_sources(jsonl({"audio_path": "s/a.wav", "caption": "x"}, kind="audio")).sources[0].form == "audio"


def test_another_caption_field():
    touch("v/a.mp4")
    found = list_sources(jsonl({"video_path": "v/a.mp4", "text": "yes"}, extra="caption_field = 'text'"))
    assert found.sources[0].caption == "yes"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "list.jsonl:2: "),
        ("[1]", "list.jsonl:2: not a JSON object"),
        ({"caption": "x"}, "list.jsonl:2: no 'video_path' field; the fields are caption"),
        (
            {"video_path": "v/a.mp4", "text": "x"},
            "list.jsonl:2: no 'caption' field for the caption; the fields are video_path, text",
        ),
        ({"video_path": "v/a.mp4", "caption": 3}, "list.jsonl:2: 'caption' must be a string"),
        ({"video_path": None, "caption": "x"}, "list.jsonl:2: 'video_path' must be a non-empty string"),
        ({"video_path": ["a"], "caption": "x"}, "list.jsonl:2: 'video_path' must be a non-empty string"),
        (
            {"video_path": "v/a\0.mp4", "caption": "x"},
            "list.jsonl:2: 'video_path' must be a string without control characters",
        ),
        ({"video_path": "../../etc/a.mp4", "caption": "x"}, "list.jsonl:2: 'video_path' leaves the working directory"),
        ({"video_path": "v/a.mp4", "caption": "x", "control_path": "../x.png"}, "list.jsonl:2: 'control_path' leaves"),
        ("[" * 100_000, "list.jsonl:2: "),
    ],
)
def test_bad_lines_are_named(line, message):
    touch("v/a.mp4")
    with pytest.raises(UserError) as caught:
        list_sources(jsonl("# first", line))
    assert message in str(caught.value)


def test_all_bad_lines_are_reported_together():
    with pytest.raises(UserError) as caught:
        list_sources(jsonl(*["{"] * 30))
    assert "list.jsonl:20:" in str(caught.value) and "and 10 more lines" in str(caught.value)


@pytest.mark.parametrize("name", ["v/gone.mp4", "v/notes.md", "empty", ".", "v/" + "x" * 5000 + ".mp4"])
def test_paths_that_are_no_clips_are_failures(name):
    touch("v/a.mp4", "v/notes.md", "empty/readme.md")
    found = list_sources(jsonl({"video_path": "v/a.mp4", "caption": ""}, {"video_path": name, "caption": ""}))
    assert len(found.sources) == 1
    assert len(found.failures) == 1 and "list.jsonl:2" in found.failures[0].reason


def test_the_same_name_from_two_folders_is_an_error():
    touch("v/a.mp4", "w/a.mp4")
    with pytest.raises(UserError, match="same stem"):
        list_sources(jsonl({"video_path": "v/a.mp4", "caption": ""}, {"video_path": "w/a.mp4", "caption": ""}))


def test_a_file_that_is_not_utf8():
    config = jsonl("{}")
    Path("lists/list.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"list\.jsonl: cannot be read"):
        list_sources(config)
