"""Sound of every kind: right samples, right times, pitch kept, silence left alone."""

from __future__ import annotations

import numpy as np
import pytest

from ltx2_tuner.media.audio import (
    has_audio,
    is_silent,
    peak_normalise,
    read_audio,
    stretch_windows,
    time_stretch,
    to_stereo,
)
from ltx2_tuner.media.errors import MediaError
from ltx2_tuner.media.write import write_wav
from tests.media.zoo import make_clip, make_sound, needs_encoder, numbered_frames, tone


def loudest_frequency(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()])


@pytest.mark.parametrize(
    ("name", "codec", "rate", "channels", "layout", "tolerance"),
    [
        ("pcm16.wav", "pcm_s16le", 44100, 2, "stereo", 1 / 32768),
        ("pcm32.wav", "pcm_f32le", 48000, 1, "mono", 0),
        ("int32.wav", "pcm_s32le", 8000, 1, "mono", 1e-6),
        ("surround.wav", "pcm_s16le", 48000, 6, "5.1", 1 / 32768),
        ("lossless.flac", "flac", 22050, 2, "stereo", 1 / 32768),
        ("phone.wav", "pcm_s16le", 8000, 1, "mono", 1 / 32768),
    ],
)
def test_lossless_sound_is_read_sample_by_sample(tmp_path, name, codec, rate, channels, layout, tolerance):
    samples = tone(rate, 0.5, channels)
    path = make_sound(tmp_path / name, samples, rate, codec, layout)
    read, read_rate = read_audio(path)
    assert read_rate == rate
    assert read.dtype == np.float32
    assert read.shape == samples.shape
    assert np.abs(read - samples).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.m4a", "aac"),
        pytest.param("b.mp3", "libmp3lame", marks=needs_encoder("libmp3lame")),
        pytest.param("c.opus", "libopus", marks=needs_encoder("libopus")),
        pytest.param("d.ogg", "libvorbis", marks=needs_encoder("libvorbis")),
    ],
)
def test_compressed_sound_starts_on_time(tmp_path, name, codec):
    samples = tone(48000, 0.5)
    samples[:, :12000] = 0
    read, rate = read_audio(make_sound(tmp_path / name, samples, 48000, codec, "stereo"))
    assert rate == 48000
    onset = int(np.argmax(np.abs(read[0]) > 0.25))
    assert abs(onset - 12000) < 0.003 * rate


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("offset", [0.0, 0.2, -0.1])
def test_time_zero_is_the_first_picture(tmp_path, suffix, offset):
    samples = tone(48000, 0.8)
    samples[:, :14400] = 0  # the tone begins 0.3 s into the sound
    path = make_clip(tmp_path / f"clip{suffix}", numbered_frames(20), sound=samples, sound_start=offset)
    read, rate = read_audio(path)
    onset = int(np.argmax(np.abs(read[0]) > 0.25)) / rate
    assert onset == pytest.approx(0.3 + offset, abs=0.004)
    part, _ = read_audio(path, 0.25, 0.5)
    assert part.shape[1] == 0.25 * rate
    assert np.array_equal(part, read[:, 12000:24000])


def test_a_cover_picture_is_no_picture(tmp_path):
    path = make_sound(tmp_path / "song.flac", tone(8000, 0.5), 8000, "flac", "stereo")
    assert has_audio(path)
    assert read_audio(path)[0].shape == (2, 4000)


def test_channels_become_two():
    mono, surround = tone(8000, 0.01, 1), tone(8000, 0.01, 6)
    assert np.array_equal(to_stereo(mono), np.concatenate([mono, mono]))
    assert np.allclose(to_stereo(surround), np.repeat(surround.mean(axis=0, keepdims=True), 2, axis=0))


def test_files_without_sound_are_named(tmp_path):
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    silent = make_clip(tmp_path / "mute.mp4", numbered_frames(3))
    assert not has_audio(silent)
    headed = tmp_path / "zero.wav"
    write_wav(headed, np.zeros((2, 0), np.float32), 8000)
    for path in (empty, silent, headed, tmp_path / "absent.wav"):
        with pytest.raises(MediaError, match=path.name):
            read_audio(path)


def test_samples_that_are_not_finite_are_refused(tmp_path):
    samples = tone(8000, 0.1, 1)
    samples[0, 100] = np.nan
    with pytest.raises(MediaError, match="not finite"):
        read_audio(make_sound(tmp_path / "nan.wav", samples, 8000, "pcm_f32le", "mono"))


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), ("b.flac", "flac"), ("c.m4a", "aac")])
def test_cut_sound_is_refused_by_name(tmp_path, name, codec):
    random = np.random.default_rng(0).uniform(-1, 1, (2, 30000)).astype(np.float32)
    data = make_sound(tmp_path / name, random, 8000, codec, "stereo").read_bytes()
    for number in range(20):
        path = tmp_path / f"cut{number}-{name}"
        path.write_bytes(data[: round(len(data) * 0.9 * number / 19)])
        with pytest.raises(MediaError, match=path.name):
            read_audio(path)


@pytest.mark.parametrize(("rate", "windows"), [(44100, (1024, 507)), (48000, (2048, 552)), (16000, (512, 184))])
def test_stretch_windows(rate, windows):
    assert stretch_windows(rate) == windows


@pytest.mark.parametrize("ratio", [0.8, 0.96, 1.25])
def test_stretching_keeps_pitch_and_gives_the_exact_length(ratio):
    samples = tone(16000, 2.0)
    length = round(samples.shape[1] * ratio)
    stretched = time_stretch(samples, 16000, length)
    assert stretched.shape == (2, length)
    for channel, frequency in ((0, 440), (1, 880)):
        assert loudest_frequency(stretched[channel], 16000) == pytest.approx(frequency, abs=4)
    if ratio <= 1:  # a phase vocoder loses power when it lengthens a mix of pure tones
        assert np.sqrt((stretched**2).mean()) == pytest.approx(np.sqrt((samples**2).mean()), rel=0.1)


def test_stretching_edge_cases():
    samples = tone(16000, 0.1)
    assert time_stretch(samples, 16000, samples.shape[1]) is samples
    assert time_stretch(samples[:, :0], 16000, 50).shape == (2, 0)
    assert time_stretch(samples[:, :10], 16000, 12).shape == (2, 12)


def test_peak_normalising_leaves_silence_alone():
    loud = peak_normalise(tone(8000, 0.1), -7.0)
    assert np.abs(loud).max() == pytest.approx(10 ** (-7 / 20), rel=1e-5)
    quiet = np.full((2, 100), 5e-5, np.float32)
    assert is_silent(quiet)
    assert np.array_equal(peak_normalise(quiet, -7.0), quiet)
