"""What workers hand over: windows of frames, spans of sound, references held on their last frame."""

from __future__ import annotations

import numpy as np
import pytest

from ltx2_tuner.caching.decoding import Failed, NoTrack, PictureJob, SoundJob, decode_pictures, decode_sound
from ltx2_tuner.data.frame_rate import FrameRate
from ltx2_tuner.media.write import write_image
from tests.media.zoo import frame_numbers, make_clip, make_sound, numbered_frames, tone

SIZE = (96, 64)


def windows_of(path, rate, windows, form="video", **options) -> dict[tuple[int, int], list[int]]:
    job = PictureJob(path, form, SIZE, rate, tuple(windows), **options)
    return {windows[index]: frame_numbers(frames, 30) for index, frames in decode_pictures(job)}


def test_overlapping_windows_of_one_clip(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", numbered_frames(25))
    windows = [(0, 1), (0, 17), (8, 17), (3, 9), (24, 1)]
    found = windows_of(clip, FrameRate(25.0, 25.0), windows)
    assert found == {(start, count): list(range(start, start + count)) for start, count in windows}


def test_frames_are_dropped_and_repeated_by_the_rate_rule(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", numbered_frames(30), rate=60)
    assert windows_of(clip, FrameRate(60.0, 25.0), [(0, 9), (3, 9)]) == {
        (0, 9): [0, 3, 5, 8, 10, 12, 15, 17, 20],
        (3, 9): [8, 10, 12, 15, 17, 20, 22, 24, 27],
    }
    assert windows_of(clip, FrameRate(12.5, 25.0), [(0, 9)]) == {(0, 9): [0, 0, 1, 1, 2, 2, 3, 3, 4]}


def test_folders_of_pictures_and_single_pictures(tmp_path):
    frames = numbered_frames(9)
    for number, frame in enumerate(frames):
        write_image(tmp_path / f"{number:03d}.png", frame)
    rate = FrameRate(None, 25.0)
    assert windows_of(tmp_path, rate, [(0, 9)], "frames") == {(0, 9): list(range(9))}
    assert windows_of(tmp_path / "004.png", rate, [(0, 1)], "image") == {(0, 1): [4]}


def test_references_hold_their_last_frame(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", numbered_frames(5))
    rate = FrameRate(None, 25.0)
    assert windows_of(clip, rate, [(2, 6)], hold_last=True) == {(2, 6): [2, 3, 4, 4, 4, 4]}
    assert windows_of(clip, rate, [(40, 2)], hold_last=True) == {(40, 2): [4, 4]}
    picture = tmp_path / "still.png"
    write_image(picture, numbered_frames(8)[7])
    assert windows_of(picture, rate, [(0, 3)], "image", hold_last=True) == {(0, 3): [7, 7, 7]}


def test_a_clip_that_ends_early_or_is_damaged_fails_with_its_name(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", numbered_frames(10))
    job = PictureJob(clip, "video", SIZE, FrameRate(25.0, 25.0), ((0, 9), (0, 17)))
    first, second = decode_pictures(job)
    assert first[0] == 0
    assert isinstance(second, Failed)
    assert "clip.mp4" in second.reason
    clip.write_bytes(clip.read_bytes()[:500])
    (only,) = decode_pictures(job)
    assert "clip.mp4" in only.reason


def test_sound_is_cut_by_time(tmp_path):
    ramp = np.linspace(0, 1, 16000, dtype=np.float32)[None]
    path = make_sound(tmp_path / "ramp.wav", ramp, 8000, "pcm_f32le", "mono")
    spans = ((0.0, 0.25), (0.5, 1.0), (1.9, 2.5), (3.0, 4.0), None)
    found = {index: (samples, rate) for index, samples, rate in decode_sound(SoundJob(path, spans))}
    assert [found[index][0].shape for index in range(5)] == [(2, 2000), (2, 4000), (2, 800), (2, 0), (2, 16000)]
    assert np.array_equal(found[1][0], np.repeat(ramp[:, 4000:8000], 2, axis=0))
    assert found[0][1] == 8000


def test_sound_is_stretched_and_scaled_as_a_whole(tmp_path):
    samples = tone(16000, 2.0, 1)
    samples[:, :16000] *= 0.5
    path = make_sound(tmp_path / "tone.wav", samples, 16000, "pcm_f32le", "mono")
    ((_, stretched, _),) = decode_sound(SoundJob(path, ((0.0, 1.0),), stretch=0.96))
    assert stretched.shape == (2, 15360)
    ((_, quiet, _),) = decode_sound(SoundJob(path, ((0.0, 1.0),), peak_db=-6.0))
    # The first second is half as loud as the peak of the track.
    assert np.abs(quiet).max() == pytest.approx(0.5 * 10 ** (-6 / 20), rel=1e-3)


def test_no_track_is_not_a_failure(tmp_path):
    mute = make_clip(tmp_path / "mute.mp4", numbered_frames(3))
    assert isinstance(next(iter(decode_sound(SoundJob(mute, (None,))))), NoTrack)
    (failed,) = decode_sound(SoundJob(tmp_path / "absent.wav", (None,)))
    assert "absent.wav" in failed.reason
