"""The media zoo: every kind of clip people bring gives exact frame counts, times and upright pictures."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from ltx2_tuner.media.errors import MediaError
from ltx2_tuner.media.video import count_frames, iter_frames, probe, read_frames, stated_fps
from tests.media.zoo import frame_numbers, make_clip, make_sound, needs_encoder, numbered_frames, tone

COUNT = 20


def check_frames(path, count=COUNT):
    assert count_frames(path).frames == count
    assert frame_numbers(read_frames(path), count) == list(range(count))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("h264.mp4", {}, id="h264"),
        pytest.param("h264.mkv", {}, id="matroska"),
        pytest.param("h264.mov", {}, id="quicktime"),
        pytest.param("h264-10.mp4", {"pix_fmt": "yuv420p10le"}, id="h264-10bit"),
        pytest.param("444.mp4", {"pix_fmt": "yuv444p"}, id="yuv444"),
        pytest.param("mpeg4.avi", {"codec": "mpeg4"}, id="avi"),
        pytest.param("vp9.webm", {"codec": "libvpx-vp9"}, id="vp9", marks=needs_encoder("libvpx-vp9")),
        pytest.param("h265.mp4", {"codec": "libx265"}, id="h265", marks=needs_encoder("libx265")),
        pytest.param(
            "h265-10.mp4",
            {"codec": "libx265", "pix_fmt": "yuv420p10le"},
            id="h265-10bit",
            marks=needs_encoder("libx265"),
        ),
        pytest.param("av1.mp4", {"codec": "libsvtav1"}, id="av1", marks=needs_encoder("libsvtav1")),
        pytest.param("streams.mkv", {"extra_streams": 1}, id="two-picture-streams"),
        pytest.param("odd name é 影 [1].mp4", {}, id="odd-name"),
    ],
)
def test_codecs_give_every_frame_in_order(tmp_path, name, options):
    path = make_clip(tmp_path / name, numbered_frames(COUNT), **options)
    check_frames(path)
    info = probe(path)
    assert (info.width, info.height, info.fps, info.is_vfr, info.has_audio) == (96, 64, 25.0, False, False)
    assert info.duration == pytest.approx(0.8, abs=0.05)


def test_odd_sizes_survive(tmp_path):
    path = make_clip(tmp_path / "odd.mkv", numbered_frames(4, 97, 65), pix_fmt="yuv444p")
    assert read_frames(path).shape == (4, 65, 97, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_metadata_is_applied(tmp_path, rotation, suffix):
    frames = numbered_frames(3)
    path = make_clip(tmp_path / f"turned{suffix}", frames, rotation=rotation)
    seen = read_frames(path)
    expected = np.rot90(frames, rotation // 90, axes=(1, 2))
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(int) - expected).mean() < 4
    info = probe(path)
    assert (info.width, info.height) == (seen.shape[2], seen.shape[1])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_noticed_and_no_frame_is_lost(tmp_path, suffix):
    times = [Fraction(i, 25) + (Fraction(1, 50) if i % 2 else 0) for i in range(COUNT)]
    path = make_clip(tmp_path / f"phone{suffix}", numbered_frames(COUNT), times=times)
    assert count_frames(path).is_vfr
    check_frames(path)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), 50, Fraction(60000, 1001)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_constant_rates_are_read_exactly_and_are_not_called_variable(tmp_path, rate, suffix):
    path = make_clip(tmp_path / f"clip{suffix}", numbered_frames(12), rate=rate)
    assert stated_fps(path) == pytest.approx(float(rate), rel=1e-4)
    assert not probe(path).is_vfr


def test_chosen_indices_are_read_repeated_and_resized(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", numbered_frames(COUNT))
    assert frame_numbers(read_frames(path, [2, 2, 5, 19]), COUNT) == [2, 2, 5, 19]
    assert frame_numbers(read_frames(path, range(15, 40)), COUNT) == [15, 16, 17, 18, 19]
    small = read_frames(path, [0, 1], resize=lambda pixels: pixels[:8, :8])
    assert small.shape == (2, 8, 8, 3)
    assert sum(1 for _ in iter_frames(path)) == COUNT
    assert count_frames(path, limit=7).frames == 7
    with pytest.raises(MediaError, match="ends before the first"):
        read_frames(path, [20])


def test_files_without_pictures_are_named(tmp_path):
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    sound = make_sound(tmp_path / "song.m4a", tone(8000, 0.5), 8000, "aac", "stereo")
    text = tmp_path / "text.mp4"
    text.write_text("not a clip")
    for path in (empty, sound, text, tmp_path / "absent.mp4"):
        for read in (probe, count_frames, read_frames):
            with pytest.raises(MediaError, match=path.name):
                read(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, suffix):
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    whole = make_clip(
        tmp_path / f"whole{suffix}", np.random.default_rng(0).integers(0, 255, (50, 64, 96, 3), np.uint8), codec=codec
    )
    data = whole.read_bytes()
    for number in range(20):
        # Up to 90 %: what follows may be an index that is not needed to decode.
        size = round(len(data) * 0.9 * number / 19)
        path = tmp_path / f"cut{number}{suffix}"
        path.write_bytes(data[:size])
        with pytest.raises(MediaError, match=path.name):
            count_frames(path)


def test_bit_flips_in_the_header_never_escape_as_other_errors(tmp_path):
    data = make_clip(tmp_path / "whole.mkv", numbered_frames(8)).read_bytes()
    random = np.random.default_rng(0)
    for number in range(20):
        damaged = bytearray(data)
        damaged[random.integers(0, 400)] ^= 1 << random.integers(0, 8)
        path = tmp_path / f"flipped{number}.mkv"
        path.write_bytes(damaged)
        try:
            assert count_frames(path).frames <= 8
        except MediaError as error:
            assert path.name in str(error)
