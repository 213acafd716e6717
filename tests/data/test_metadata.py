from __future__ import annotations

import os

import pytest

from ltx2_tuner.data.metadata import canonical_json, setting_changes, source_metadata, stale_reason

FILE = {
    "source_size": "100",
    "source_mtime_ns": "5",
    "target_fps": "25.0",
    "bucket": "768x512",
    "crop_start": "0",
    "frame_count": "17",
    "caption1": "a cat",
    "component_id": "0123456789abcdef",
    "gemma_id": "fedcba9876543210",
    "ltx_mode": "video",
    "preprocess": canonical_json({"vae_dtype": "bfloat16", "ltx_mode": "video"}),
}


def test_a_file_that_fits_is_not_stale():
    assert stale_reason(FILE, dict(FILE, target_fps="25")) is None


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("source_size", "101", "the source file changed"),
        ("source_mtime_ns", "6", "the source file changed"),
        ("target_fps", "24.0", "target_fps changed (25.0 -> 24.0)"),
        ("bucket", "512x768", "the bucket changed (768x512 -> 512x768)"),
        ("crop_start", "17", "the window moved (0 -> 17)"),
        ("frame_count", "33", "the frame count changed (17 -> 33)"),
        ("caption1", "a dog", "the caption changed"),
        ("component_id", "1123456789abcdef", "made with another checkpoint (0123456789abcdef -> 1123456789abcdef)"),
        ("gemma_id", "0", "made with another Gemma (fedcba9876543210 -> 0)"),
        ("ltx_mode", "av", "made for another mode (video -> av)"),
        (
            "preprocess",
            canonical_json({"ltx_mode": "video", "vae_dtype": "float32", "new": 1}),
            "settings changed: vae_dtype bfloat16 -> float32",
        ),
    ],
)
def test_every_difference_has_its_reason(key, value, reason):
    assert stale_reason(FILE, dict(FILE, **{key: value})) == reason


def test_what_either_side_does_not_know_is_no_difference():
    assert stale_reason({}, FILE) is None
    assert stale_reason(FILE, {}) is None
    assert setting_changes("{}", FILE["preprocess"]) == ""


def test_unreadable_settings_are_a_difference():
    assert stale_reason(dict(FILE, preprocess="{"), FILE) == "settings changed: not readable in the file"


def test_captions_are_compared_as_text():
    assert stale_reason({"caption1": "25"}, {"caption1": "25.0"}) == "the caption changed"


def test_canonical_json_does_not_depend_on_order():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'


def test_sources_are_named_relative_to_the_cache(tmp_path):
    source = tmp_path / "videos" / "a b.mp4"
    source.parent.mkdir()
    source.write_bytes(b"abc")
    os.utime(source, ns=(7_000_000_000, 7_000_000_000))
    found = source_metadata(source, tmp_path / "cache" / "train")
    assert found == {
        "source_path": "../../videos/a b.mp4",
        "source_path_format": "relative_to_cache",
        "source_size": "3",
        "source_mtime_ns": "7000000000",
    }
    assert "source_size" not in source_metadata(source.parent, tmp_path)
