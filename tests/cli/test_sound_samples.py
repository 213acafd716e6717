"""Sound of samples: the flags that choose it, its files, rates and lengths."""

from __future__ import annotations

import wave
from pathlib import Path

import av
import numpy as np
import pytest

from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.cli.ltx2_generate_video import main
from ltx2_tuner.text_encoding import write_tiny_gemma

FRAMES, FPS = 17, 24.0
RATES = {"2.0": 24000, "2.3": 48000}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for version in RATES:
        write_tiny_checkpoint(folder / f"{version}.safetensors", version=version, seed=0)
    write_tiny_gemma(folder / "gemma", seed=0)
    return folder


def generate(models: Path, output: Path, *flags: object, version: str = "2.3", mode: str = "av") -> dict[str, Path]:
    """Sample; the files by the end of their names."""
    command = ["--ltx2_checkpoint", models / f"{version}.safetensors", "--gemma_root", models / "gemma"]
    command += ["--ltx2_mode", mode, "--prompt", "a bell", "--output_dir", output, "--seed", 1, "--device", "cpu"]
    command += ["--mixed_precision", "no", "--vae_dtype", "float32", "--sample_steps", 1]
    command += ["--width", 64, "--height", 64, "--frame_count", FRAMES, "--fps", FPS]
    assert main([str(part) for part in (*command, *flags)]) == 0
    return {path.name.split("_")[-1]: path for path in output.iterdir()}


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples (S, 2) and the rate of the header."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (2, 2)
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
        return values, file.getframerate()


@pytest.mark.parametrize("version", RATES)
def test_sound_alone_has_the_rate_of_its_vocoder_in_either_process(models, tmp_path, version):
    flags = ("--sample_audio_only",)
    apart = generate(models, tmp_path / "apart", *flags, "--sample_audio_subprocess", version=version)
    within = generate(models, tmp_path / "within", *flags, "--no-sample_audio_subprocess", version=version)
    (first,), (second,) = apart.values(), within.values()
    assert first.suffix == second.suffix == ".wav"
    samples, rate = read_wav(first)
    assert rate == RATES[version]
    assert len(samples) == round(FRAMES / FPS * rate)
    others, other_rate = read_wav(second)
    assert other_rate == rate
    # Another process may split its sums among other threads; one step of 16 bits is all that may come of it.
    assert np.abs(samples.astype(int) - others).max() <= 1
    assert samples.any()


def test_picture_and_sound_are_written_apart_and_together(models, tmp_path):
    files = generate(models, tmp_path, "--sample_merge_audio", "--no-sample_audio_subprocess")
    kinds = sorted("av" if path.name.endswith("_av.mp4") else path.suffix for path in files.values())
    assert kinds == [".mp4", ".wav", "av"]
    samples, rate = read_wav(next(path for path in files.values() if path.suffix == ".wav"))
    assert len(samples) == round(FRAMES / FPS * rate)
    with av.open(str(next(path for path in files.values() if path.name.endswith("_av.mp4")))) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", rate, 2)
        lengths = [float(stream.duration * stream.time_base) for stream in (picture, sound)]
    # The last block of the encoder has 1024 samples.
    assert lengths[0] == pytest.approx(FRAMES / FPS, abs=1e-3)
    assert abs(lengths[0] - lengths[1]) <= 1024 / rate


def test_sound_can_be_left_out(models, tmp_path):
    files = generate(models, tmp_path, "--sample_disable_audio", "--sample_merge_audio")
    assert [path.suffix for path in files.values()] == [".mp4"]
    assert not any(path.name.endswith("_av.mp4") for path in files.values())


def test_mode_video_says_that_there_is_no_sound(models, tmp_path, caplog):
    with caplog.at_level("INFO"):
        files = generate(models, tmp_path, "--sample_merge_audio", mode="video")
    assert [path.suffix for path in files.values()] == [".mp4"]
    assert "no sound is made with --ltx2_mode video; sound takes --ltx2_mode av" in caplog.text


def test_a_decoder_that_fails_costs_the_sound_alone(models, tmp_path, caplog, monkeypatch):
    from ltx2_tuner.sampling import sampler
    from ltx2_tuner.sampling.audio_preview import AudioPreviewError

    def fail(checkpoint, latents):
        raise AudioPreviewError("decoding the sound failed: out of memory")

    monkeypatch.setattr(sampler, "decode_in_subprocess", fail)
    files = generate(models, tmp_path, "--sample_audio_subprocess", "--sample_merge_audio")
    assert [path.suffix for path in files.values()] == [".mp4"]
    assert "has no sound: decoding the sound failed: out of memory" in caplog.text
