from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.data.frame_rate import FrameRate, detection_line, resampling_line

RATES = st.sampled_from(
    [8.0, 12.0, 15.0, 22.0, 23.976, 24.0, 25.0, 27.0, 29.97, 30000 / 1001, 50.0, 59.94, 60.0, 120.0]
)


@pytest.mark.parametrize("source", [23.976, 24000 / 1001, 24.0, 25.0, 26.0])
def test_rates_near_the_target_pass_through(source):
    rate = FrameRate(source, 25.0)
    assert not rate.resampled
    assert rate.source_indices(3, 4) == [3, 4, 5, 6]
    assert rate.output_count(100) == 100


@pytest.mark.parametrize("source", [22.0, 27.0, 29.97, 30.0, 50.0, 59.94, 60.0])
def test_other_rates_are_resampled(source):
    assert FrameRate(source, 25.0).resampled


@pytest.mark.parametrize("source", [59.94, 60.0])
def test_sixty_to_sixty_keeps_every_frame(source):
    assert not FrameRate(source, 60.0).resampled


def test_indices_of_the_worked_examples():
    assert FrameRate(60.0, 25.0).source_indices(0, 12) == [0, 3, 5, 8, 10, 12, 15, 17, 20, 22, 24, 27]
    assert FrameRate(60.0, 25.0).output_count(240) == 100
    assert FrameRate(30.0, 25.0).source_indices(0, 7) == [0, 2, 3, 4, 5, 6, 8]
    assert FrameRate(24.0, 60.0).source_indices(0, 7) == [0, 0, 0, 1, 1, 2, 2]
    assert FrameRate(24.0, 60.0).output_count(24) == 58
    assert FrameRate(24.0, 60.0).repeats_frames


def test_unknown_rate_keeps_frames_and_counts_time_at_the_target():
    rate = FrameRate(None, 25.0)
    assert not rate.resampled
    assert rate.frame_seconds == pytest.approx(1 / 25)
    assert rate.stretch == 1.0


def test_time_of_one_frame_and_stretch():
    assert FrameRate(60.0, 25.0).frame_seconds == pytest.approx(1 / 25)
    assert FrameRate(60.0, 25.0).stretch == 1.0
    kept = FrameRate(24.0, 25.0)
    assert kept.frame_seconds == pytest.approx(1 / 24)
    assert kept.stretch == pytest.approx(0.96)


def test_log_lines_have_the_documented_form():
    assert detection_line(FrameRate(60.0, 25.0), "my_video.mp4") == "Auto-detected source FPS: 60.00 for my_video.mp4"
    assert resampling_line(FrameRate(60.0, 25.0), "my_video.mp4") == "Resampling my_video.mp4: 60.00 FPS -> 25.00 FPS"


@given(source=RATES, target=st.sampled_from([12.0, 24.0, 25.0, 30.0, 60.0]), frames=st.integers(1, 2000))
def test_output_frames_exist_and_stay_in_time(source, target, frames):
    rate = FrameRate(source, target)
    count = rate.output_count(frames)
    indices = rate.source_indices(0, count)
    assert indices == sorted(indices)
    assert indices[0] == 0 and indices[-1] < frames
    assert rate.source_index(count) >= frames - rate.repeats_frames
    if rate.resampled:
        assert all(abs(index / source - j / target) < 1 / source + 1e-3 for j, index in enumerate(indices))


@given(source=st.sampled_from([30.0, 30000 / 1001, 50.0, 60.0, 120.0]), frames=st.integers(1, 500))
def test_dropping_keeps_the_first_frame_of_every_output_tick(source, frames):
    ratio = Fraction(25) / Fraction(source).limit_denominator(100_000)
    ticks = [math.floor(index * ratio) for index in range(-1, frames)]
    kept = [index for index in range(frames) if ticks[index + 1] != ticks[index]]
    rate = FrameRate(source, 25.0)
    assert rate.source_indices(0, rate.output_count(frames)) == kept
