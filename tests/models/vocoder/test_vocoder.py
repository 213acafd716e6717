"""Sizes, lengths and filters of the vocoders."""

from __future__ import annotations

import math

import pytest
import torch

from ltx2_tuner.models.vocoder import Vocoder, infer_section
from ltx2_tuner.models.vocoder.activation import AntiAliasedSnake, DownSample, UpSample, kaiser_sinc
from ltx2_tuner.models.vocoder.extension import hann_upsample

AMP = {"resblock": "AMP1", "activation": "snakebeta", "use_tanh_at_final": False, "use_bias_at_final": False}
PLAIN = {"upsample_initial_channel": 1024, "output_sampling_rate": 24000}
EXTENDED = {
    "vocoder": {
        **AMP,
        "upsample_initial_channel": 1536,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **AMP,
        "upsample_initial_channel": 512,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "hop_length": 80,
        "n_fft": 512,
        "num_mels": 64,
    },
}


def narrow(section: dict, width: int = 64) -> dict:
    if "bwe" in section:
        return {key: {**value, "upsample_initial_channel": width} for key, value in section.items()}
    return {**section, "upsample_initial_channel": width}


@pytest.mark.parametrize(
    ("section", "entries", "parameters"), [(PLAIN, 194, 55_592_802), (EXTENDED, 1227, 128_537_448)]
)
def test_released_sizes(section, entries, parameters) -> None:
    with torch.device("meta"):
        vocoder = Vocoder.from_config(section)
    assert len(vocoder.state_dict()) == entries
    assert sum(parameter.numel() for parameter in vocoder.parameters()) == parameters


@pytest.mark.parametrize(("section", "rate", "per_frame"), [(PLAIN, 24000, 240), (EXTENDED, 48000, 480)])
def test_lengths_and_range(section, rate, per_frame) -> None:
    torch.manual_seed(0)
    vocoder = Vocoder.from_config(narrow(section)).eval()
    with torch.no_grad():
        waveform = vocoder(torch.randn(2, 2, 7, 64))
    assert vocoder.output_rate == rate
    assert waveform.shape == (2, 2, 7 * per_frame)
    assert waveform.abs().max() <= 1 and waveform.isfinite().all()


@pytest.mark.parametrize("section", [narrow(PLAIN), narrow(EXTENDED)])
def test_config_is_inferred_from_shapes(section) -> None:
    with torch.device("meta"):
        vocoder = Vocoder.from_config(section)
        shapes = {name: tuple(value.shape) for name, value in vocoder.state_dict().items()}
        again = Vocoder.from_config(infer_section(shapes))
    assert again.config == vocoder.config


def test_shapes_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="no vocoder"):
        infer_section({"encoder.conv_in.weight": (1, 2)})


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({**PLAIN, "resblock": "2"}, "resblock"),
        ({**PLAIN, "activation": "gelu"}, "gelu"),
        ({**PLAIN, "upsample_rates": [2, 2]}, "upsample_rates"),
        ({**EXTENDED, "bwe": {**EXTENDED["bwe"], "output_sampling_rate": 44100}}, "44100"),
    ],
)
def test_a_config_it_cannot_follow_is_refused(section, named) -> None:
    with pytest.raises(ValueError, match=named):
        Vocoder.from_config(section)


def test_the_extension_keeps_the_low_band_and_is_clamped() -> None:
    torch.manual_seed(0)
    vocoder = Vocoder.from_config(narrow(EXTENDED)).eval()
    vocoder.bwe_generator.conv_post.weight.data.zero_()
    mel = torch.randn(1, 2, 9, 64)
    with torch.no_grad():
        low = vocoder.vocoder(mel)
        torch.testing.assert_close(vocoder(mel), hann_upsample(low, 3).clamp(-1, 1))


def test_causal_spectrogram_sees_no_later_sample() -> None:
    mel_stft = Vocoder.from_config(narrow(EXTENDED)).mel_stft
    waveform = torch.rand(1, 2, 800)
    changed = waveform.clone()
    changed[..., 400:] = 0
    before, after = mel_stft(waveform), mel_stft(changed)
    assert before.shape == (1, 2, 64, 10)
    assert torch.equal(before[..., :5], after[..., :5]) and not torch.equal(before[..., 5:], after[..., 5:])


def test_filter_of_the_anti_aliasing() -> None:
    taps = kaiser_sinc(12, 2).flatten()
    torch.testing.assert_close(taps, taps.flip(0))
    torch.testing.assert_close(taps.sum(), torch.tensor(1.0))
    # Design values: Kaiser beta 4.6638, cutoff a quarter of the rate.
    window = torch.kaiser_window(12, periodic=False, beta=4.6638)
    ideal = window * torch.sinc((torch.arange(12) - 5.5) / 2)
    torch.testing.assert_close(taps, ideal / ideal.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 5, 64])
def test_resampling_keeps_length_and_slow_signals(length) -> None:
    x = torch.randn(2, 3, length)
    assert UpSample()(x).shape == (2, 3, 2 * length)
    assert DownSample()(UpSample()(x)).shape == x.shape
    assert hann_upsample(x, 3).shape == (2, 3, 3 * length)
    constant = torch.ones(1, 2, length)
    torch.testing.assert_close(DownSample()(UpSample()(constant)), constant, atol=5e-3, rtol=0)
    torch.testing.assert_close(hann_upsample(constant, 3), torch.ones(1, 2, 3 * length), atol=5e-3, rtol=0)
    times = torch.arange(90.0)
    slow = torch.sin(2 * math.pi * times / 30)[None, None]
    fast = torch.sin(2 * math.pi * torch.arange(270.0) / 90)[None, None]
    torch.testing.assert_close(hann_upsample(slow, 3)[..., 30:-30], fast[..., 30:-30], atol=5e-3, rtol=0)


def test_snake_of_each_kind() -> None:
    x = torch.randn(1, 4, 32)
    for kind, names in (("snake", {"act.alpha"}), ("snakebeta", {"act.alpha", "act.beta"})):
        activation = AntiAliasedSnake(4, kind)
        assert {name for name, _ in activation.named_parameters()} == names
        activation.act.alpha.data.fill_(0.3)
        alpha = math.exp(0.3)
        beta = alpha if kind == "snake" else 1.0
        torch.testing.assert_close(activation.act(x), x + torch.sin(alpha * x) ** 2 / beta)
