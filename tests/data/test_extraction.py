from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.data.extraction import MODES, latent_frames, pad8, round8, windows


@pytest.mark.parametrize(
    ("frames", "expected"), [(1, 1), (8, 1), (9, 9), (13, 9), (17, 17), (20, 17), (50, 49), (129, 129)]
)
def test_round8(frames, expected):
    assert round8(frames) == expected


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (2, 9), (9, 9), (45, 49)])
def test_pad8(frames, expected):
    assert pad8(frames) == expected


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (9, 2), (13, 3), (33, 5)])
def test_latent_frames(frames, expected):
    assert latent_frames(frames) == expected


@pytest.mark.parametrize(
    ("mode", "targets", "options", "expected"),
    [
        ("head", [1, 17, 33], {}, "0,1 0,17 0,33"),
        ("chunk", [17, 33], {}, "0,17 17,17 0,33"),
        ("slide", [1, 17, 33], {"stride": 10}, "0,1 10,1 20,1 30,1 0,17 10,17 20,17 0,33"),
        ("uniform", [1, 17, 33], {"sample": 4}, "0,1 13,1 26,1 39,1 0,17 7,17 15,17 23,17 0,33 2,33 4,33 7,33"),
        ("full", [1], {"max_frames": 33}, "0,33"),
    ],
)
def test_worked_example_of_forty_frames(mode, targets, options, expected):
    found = windows(mode, 40, targets, **options)
    assert " ".join(f"{start},{count}" for start, count in found) == expected


@pytest.mark.parametrize(("frames", "expected"), [(1, (0, 1)), (8, (0, 1)), (9, (0, 9)), (40, (0, 33))])
def test_full_takes_the_largest_legal_length(frames, expected):
    assert windows("full", frames, [1], max_frames=33) == [expected]


def test_uniform_positions_that_coincide_count_once():
    assert [start for start, _ in windows("uniform", 35, [33], sample=9)] == [0, 1, 2]


def test_one_sample_is_the_head():
    assert windows("uniform", 40, [17, 33], sample=1) == windows("head", 40, [17, 33])


def test_a_clip_shorter_than_every_target_gives_nothing():
    assert windows("head", 16, [17, 33]) == []


@given(
    mode=st.sampled_from(MODES),
    frames=st.integers(1, 400),
    targets=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    stride=st.integers(1, 40),
    sample=st.integers(1, 12),
)
def test_windows_lie_inside_the_clip_and_never_repeat(mode, frames, targets, stride, sample):
    found = windows(mode, frames, targets, stride=stride, sample=sample)
    assert len(set(found)) == len(found)
    assert all(count % 8 == 1 and start >= 0 and start + count <= frames for start, count in found)
    counts = [count for _, count in found]
    assert counts == sorted(counts)
