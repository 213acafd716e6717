"""What is written reads back: pictures, times, sound of equal length."""

from __future__ import annotations

import wave

import numpy as np
import pytest

from ltx2_tuner.media.audio import read_audio
from ltx2_tuner.media.images import read_image
from ltx2_tuner.media.video import count_frames, read_frames
from ltx2_tuner.media.write import write_image, write_video, write_wav
from tests.media.zoo import frame_numbers, numbered_frames, tone


@pytest.mark.parametrize("fps", [25, 23.976, 30000 / 1001])
def test_clips_read_back(tmp_path, fps):
    frames = numbered_frames(9)
    frames[:, :32, :48] = (220, 40, 30)
    path = tmp_path / "sämple 1.mp4"
    write_video(path, frames, fps)
    info = count_frames(path)
    assert (info.frames, info.has_audio) == (9, False)
    assert info.fps == pytest.approx(fps, rel=1e-4)
    read = read_frames(path)
    assert frame_numbers(read, 9) == list(range(9))
    assert np.abs(read.astype(int) - frames).mean() < 3
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("seconds", [0.2, 3.0])
def test_sound_is_as_long_as_the_picture(tmp_path, seconds):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(25), 25, (tone(48000, seconds, 1), 48000))
    samples, rate = read_audio(path)
    assert rate == 48000
    assert 0 <= samples.shape[1] - 48000 < 1024  # whole AAC frames
    end = round(min(seconds, 1.0) * rate) - 2048
    assert np.abs(samples[:, 2048:end] - tone(48000, 1.0, 1)[:, 2048:end]).max() < 0.05
    if seconds < 1:
        assert np.abs(samples[:, end + 6000 :]).max() < 0.01


def test_sizes_that_yuv420p_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="33x20"):
        write_video(tmp_path / "odd.mp4", np.zeros((2, 20, 33, 3), np.uint8), 25)
    assert not list(tmp_path.iterdir())


def test_wav_is_16_bit_stereo(tmp_path):
    path = tmp_path / "tone.wav"
    write_wav(path, np.array([[0.0, 0.5, -0.5, 1.5, -1.5]], np.float32), 24000)
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (2, 2, 24000)
        values = np.frombuffer(wav.readframes(5), "<i2").reshape(5, 2)
    assert values[:, 0].tolist() == values[:, 1].tolist() == [0, 16383, -16383, 32767, -32767]


def test_pictures_read_back(tmp_path):
    picture = numbered_frames(1)[0]
    write_image(tmp_path / "still.png", picture)
    write_image(tmp_path / "still.jpg", picture)
    assert np.array_equal(read_image(tmp_path / "still.png"), picture)
    assert np.abs(read_image(tmp_path / "still.jpg").astype(int) - picture).mean() < 3
