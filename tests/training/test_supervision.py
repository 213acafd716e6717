"""What the run says about its sound."""

from __future__ import annotations

import pytest

from ltx2_tuner.training.supervision import AudioMonitor, SupervisionOptions, audio_plan


def test_a_long_stretch_without_sound_is_noted(caplog):
    monitor = AudioMonitor(SupervisionOptions())
    monitor.observe(True)
    for _ in range(49):
        monitor.observe(False)
    assert not caplog.text
    monitor.observe(False)
    assert "50 batches in a row without sound (1 of 51 so far had some)" in caplog.text


@pytest.mark.parametrize(("ratio", "told"), [(0.1, True), (0.5, False)])
def test_sound_that_is_learned_too_early_is_told_once(caplog, ratio, told):
    monitor = AudioMonitor(SupervisionOptions())
    for _ in range(100):
        found = monitor.follow({"loss/audio_video_ratio": ratio})
        monitor.follow({})  # a step without sound
    assert found["loss/audio_video_ratio_ema"] == pytest.approx(ratio)
    restored = AudioMonitor(SupervisionOptions())
    restored.load_state(monitor.state())
    for _ in range(150):
        restored.follow({"loss/audio_video_ratio": ratio})
    assert caplog.text.count("--audio_loss_balance_mode ema_mag") == int(told)


def test_enough_sound_is_told_too(caplog):
    monitor = AudioMonitor(SupervisionOptions(mode="error", warmup=2, interval=2, min_ratio=0.5))
    with caplog.at_level("INFO"):
        monitor.observe(True)
        monitor.observe(False)
    assert "1 of 2 batches had sound (0.50)" in caplog.text
    assert monitor.share == 0.5


def test_states_of_earlier_versions_load():
    monitor = AudioMonitor(SupervisionOptions())
    monitor.load_state({"expected": 4, "supervised": 1})
    assert monitor.share == 0.25 and monitor.ratio_steps == 0


@pytest.mark.parametrize(
    ("share", "without", "balance", "parts", "absent"),
    [
        (1.0, None, "none", ["sound in 100 %", "audio weight fixed"], ["others", "drift"]),
        (0.4, None, "none", ["sound in 40 %", "the picture alone", "drift", "inv_freq"], []),
        (0.4, "silence (weight 0.5)", "none", ["the others train silence (weight 0.5)"], ["drift"]),
        (0.4, None, "inv_freq", ["audio weight by inv_freq"], ["drift"]),
    ],
)
def test_the_plan(share, without, balance, parts, absent):
    line = audio_plan(share, without_sound=without, balance=balance)
    assert all(part in line for part in parts)
    assert not any(part in line for part in absent)
