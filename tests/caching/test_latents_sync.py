"""Picture and sound stay together: a clap-and-flash clip at every common frame rate, through the real cutting rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ltx2_tuner.caching.decoding import PictureJob, SoundJob, decode_pictures, decode_sound
from ltx2_tuner.caching.targets import LatentOptions, TargetMaker
from ltx2_tuner.data.companions import SoundFinder
from ltx2_tuner.data.config import load_dataset_config
from ltx2_tuner.data.items import list_items
from tests.media.zoo import make_clip

RATES = ("24000/1001", "24", "25", "30000/1001", "30", "50", "60000/1001", "60")
TARGET_FPS = 25
LATENT_FRAME = 8 / TARGET_FPS  # seconds
SOUND_RATE = 48000
FLASH_SECONDS = 0.15
ROUNDING = 0.002  # seconds: of the table to milliseconds, and of the AAC encoders of different builds


@dataclass(frozen=True)
class Drift:
    """Distance between clap and flash in seconds: at the worst, and the mean of sound after picture."""

    events: int
    worst: float
    mean: float


def clap_and_flash(path, rate: Fraction, seconds: float, period: float):
    """Black with a white flash every `period` seconds, and a click that starts with each."""
    count = int(seconds * rate)
    frames = np.zeros((count, 32, 32, 3), np.uint8)
    sound = np.zeros((2, round(count / rate * SOUND_RATE)), np.float32)
    click = 0.8 * np.sign(np.sin(2 * np.pi * 1000 * np.arange(round(FLASH_SECONDS * SOUND_RATE)) / SOUND_RATE))
    for number in range(1, int(seconds / period)):
        first = round(number * period * rate)
        frames[first : first + round(FLASH_SECONDS * rate)] = 255
        start = round(first / rate * SOUND_RATE)
        part = sound[:, start : start + len(click)]
        part[:] = click[: part.shape[1]]
    return make_clip(path, frames, rate=rate, sound=sound)


def onsets(signal: np.ndarray, threshold: float, gap: int) -> np.ndarray:
    """Indices at which a signal rises above the threshold after having been below it for `gap` samples."""
    above = np.flatnonzero(signal > threshold)
    return above[np.diff(above, prepend=-gap - 1) > gap]


def measure(tmp_path, rate: str, seconds: float, period: float, mode: str = "head") -> Drift:
    """Cache a clip of so many seconds and compare the times of claps and flashes at the training rate."""
    folder = tmp_path / "clips"
    folder.mkdir()
    clip = clap_and_flash(folder / "clap.mp4", Fraction(rate), seconds, period)
    clip.with_suffix(".txt").write_text("clap")
    target = int(seconds * min(Fraction(rate), TARGET_FPS) - 1) // 8 * 8 + 1 if mode == "head" else 49
    config_path = tmp_path / "data.toml"
    config_path.write_text(
        f"[[datasets]]\nvideo_directory = '{folder}'\nresolution = [64, 64]\n"
        f"target_frames = [{target}]\nframe_extraction = '{mode}'\n"
    )
    config = load_dataset_config(config_path, "av")
    maker = TargetMaker(config, LatentOptions())
    worst, later = 0.0, []
    for item in list_items(config.datasets[0], sound=SoundFinder()).items:
        picture, sound = maker.picture(item), maker.sound(item, config.datasets[0])
        job = PictureJob(picture.source, picture.form, picture.size, picture.rate, ((picture.start, picture.count),))
        ((_, frames),) = decode_pictures(job)
        ((_, samples, sample_rate),) = decode_sound(SoundJob(sound.source, (sound.span,), sound.stretch))
        seen = onsets(frames.mean(axis=(1, 2, 3)), 128, 3) / TARGET_FPS
        heard = onsets(np.abs(samples[0]), 0.25, sample_rate // 5) / sample_rate
        seen, heard = (times[(times > 0.2) & (times < len(frames) / TARGET_FPS - 0.3)] for times in (seen, heard))
        assert len(seen) == len(heard)
        drift = heard - seen
        worst = max(worst, *np.abs(drift), 0.0)
        later.extend(drift)
    return Drift(len(later), worst, float(np.mean(later)))


@pytest.fixture(scope="module")
def documented() -> dict[str, tuple[float, float]]:
    """Worst and mean distance in seconds that the guide promises, by frame rate."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "audio-sync.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \|[^|]*\| (\d+) ms \| ([+-]?\d+) ms \|$", text, re.MULTILINE)
    return {rate: (int(worst) / 1000, int(mean) / 1000) for rate, worst, mean in rows}


@pytest.mark.parametrize("rate", RATES)
def test_clap_and_flash_stay_together(tmp_path, documented, rate):
    """Better than the latent frame that is asked for, and as good as the table of the guide says."""
    drift = measure(tmp_path, rate, 10.0, 1.1)
    print(f"| {float(Fraction(rate)):.3f} | {drift.events} | {1000 * drift.worst:.0f} | {1000 * drift.mean:+.0f} |")
    assert drift.events >= 7
    assert drift.worst < LATENT_FRAME
    assert drift.worst < 1 / TARGET_FPS
    worst, mean = documented[f"{float(Fraction(rate)):.3f}".rstrip("0").rstrip(".")]
    assert drift.worst <= worst + ROUNDING
    assert abs(drift.mean - mean) <= ROUNDING


@pytest.mark.parametrize("rate", ["24000/1001", "60"])
def test_later_windows_are_in_time_too(tmp_path, rate):
    drift = measure(tmp_path, rate, 10.0, 1.1, mode="chunk")
    assert drift.events >= 5
    assert drift.worst < 1 / TARGET_FPS
