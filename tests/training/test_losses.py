from __future__ import annotations

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.balance import AudioBalancer, BalanceOptions
from ltx2_tuner.training.losses import element_loss, reduce_loss
from ltx2_tuner.training.supervision import AudioMonitor, SupervisionOptions


def test_element_losses():
    difference = torch.tensor([[[0.5, -3.0]]])
    zero = torch.zeros_like(difference)
    assert element_loss(difference, zero).flatten().tolist() == [0.25, 9.0]
    assert element_loss(difference, zero, "l1").flatten().tolist() == [0.5, 3.0]
    assert element_loss(difference, zero, "huber", delta=2.0).flatten().tolist() == [0.0625, 2.0]


def test_huber_is_torch_smooth_l1():
    prediction, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = torch.nn.functional.smooth_l1_loss(prediction, target, beta=0.7, reduction="none")
    torch.testing.assert_close(element_loss(prediction, target, "smooth_l1", 0.7), expected)


def test_low_precision_predictions_are_compared_in_float32():
    prediction, target = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16), torch.full((1, 1, 1), 1.001)
    assert element_loss(prediction, target).item() == pytest.approx(1e-6, rel=1e-3)


def test_each_sample_is_normalised_by_its_own_tokens():
    elements = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]])[..., None].expand(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = reduce_loss(elements, mask)
    assert loss.per_sample.tolist() == [2.0, 5.0]
    assert loss.mean.item() == 3.5


def test_samples_without_tokens_do_not_dilute_the_others():
    elements = torch.full((2, 3, 4), 2.0)
    loss = reduce_loss(elements, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert loss.mean.item() == 2.0
    assert reduce_loss(elements, torch.zeros(2, 3)).mean.item() == 0.0


def test_sample_weights_scale_single_samples():
    loss = reduce_loss(torch.ones(2, 3, 4), torch.ones(2, 3))
    assert loss.weighted(torch.tensor([1.0, 0.5])).item() == 0.75
    assert loss.weighted(None) is loss.mean


def test_magnitude_balancing_follows_its_example():
    balancer = AudioBalancer(BalanceOptions(mode="ema_mag"))
    weight = balancer.weight(1.0, torch.tensor(0.4), torch.tensor(0.2))
    assert weight.item() == pytest.approx(0.330665, abs=1e-6)


def test_magnitude_balancing_without_audio_moves_only_the_video_average():
    balancer = AudioBalancer(BalanceOptions(mode="ema_mag"))
    balancer.weight(1.0, torch.tensor(0.4), None)
    assert balancer.state() == pytest.approx({"presence": 1.0, "audio_size": 1.0, "video_size": 0.994})


def test_frequency_balancing_follows_its_sequence():
    balancer = AudioBalancer(BalanceOptions(mode="inv_freq", beta=0.5))
    seen = []
    for present in (True, False, False, True):
        balancer.weight(1.0, torch.tensor(1.0), torch.tensor(1.0) if present else None)
        seen.append(balancer.presence.item())
    assert seen == [1.0, 0.5, 0.25, 0.625]


def test_the_balanced_weight_is_clamped_and_its_state_restores():
    balancer = AudioBalancer(BalanceOptions(mode="inv_freq", beta=1.0, maximum=3.0))
    balancer.weight(1.0, torch.tensor(1.0), None)
    assert balancer.presence.item() == 0
    restored = AudioBalancer(BalanceOptions(mode="inv_freq", beta=1.0, maximum=3.0))
    restored.load_state(balancer.state())
    assert restored.presence.item() == 0
    assert balancer.weight(1.0, torch.tensor(1.0), None).item() == 3.0


def test_a_nan_loss_does_not_stay_in_the_averages():
    balancer = AudioBalancer(BalanceOptions(mode="ema_mag"))
    balancer.weight(1.0, torch.tensor(float("nan")), torch.tensor(float("inf")))
    assert all(value == value and value < 10 for value in balancer.state().values())


def test_the_monitor_warns_and_stops(caplog):
    options = SupervisionOptions(mode="warn", warmup=4, interval=2, min_ratio=0.6)
    monitor = AudioMonitor(options)
    for has_audio in (True, False, True, False):
        monitor.observe(has_audio)
    assert "2 of 4 batches had sound" in caplog.text
    strict = AudioMonitor(SupervisionOptions(mode="error", warmup=4, interval=2, min_ratio=0.6))
    strict.load_state(monitor.state())
    strict.observe(False)
    with pytest.raises(UserError, match="2 of 6 batches"):
        strict.observe(False)
