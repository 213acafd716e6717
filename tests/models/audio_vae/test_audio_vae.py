"""Sizes, causality and front end of the sound autoencoder."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig, LogMel, encode_waveform
from ltx2_tuner.models.audio_vae.mel import mel_filters, resample, to_stereo

RELEASED = {
    "model": {"params": {"ddconfig": {"attn_resolutions": [], "mid_block_add_attention": False}}},
    "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "causal": True}},
}


def tiny(**sizes) -> AudioVAEConfig:
    values = {"ch": 8, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 2, "attn_resolutions": []}
    values |= {"mid_block_add_attention": False, **sizes}
    return AudioVAEConfig.from_dict({"model": {"params": {"ddconfig": values}}})


def tone(seconds: float, rate: int = 16000, channels: int = 2) -> torch.Tensor:
    times = torch.arange(round(seconds * rate)) / rate
    pitches = torch.tensor([440.0, 554.4, 659.3][:channels])[:, None]
    return (0.3 * torch.sin(2 * math.pi * pitches * times))[None]


@pytest.mark.parametrize(
    ("kind", "entries", "parameters"), [(AudioEncoder, 46, 21_333_008), (AudioDecoder, 58, 31_915_138)]
)
def test_released_sizes(kind, entries, parameters) -> None:
    with torch.device("meta"):
        model = kind(AudioVAEConfig.from_dict(RELEASED))
    assert len(model.state_dict()) == entries
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("parts", [("encoder", "decoder"), ("encoder",), ("decoder",)])
@pytest.mark.parametrize("config", [AudioVAEConfig.from_dict(RELEASED), tiny(), tiny(mid_block_add_attention=True)])
def test_config_is_inferred_from_shapes(config, parts) -> None:
    shapes = {}
    with torch.device("meta"):
        for part, kind in (("encoder", AudioEncoder), ("decoder", AudioDecoder)):
            for name, value in kind(config).state_dict().items():
                if name.startswith("per_channel_statistics."):
                    shapes[f"audio_vae.{name}"] = tuple(value.shape)
                elif part in parts:
                    shapes[f"audio_vae.{part}.{name}"] = tuple(value.shape)
    assert AudioVAEConfig.from_shapes(shapes) == config


def test_shapes_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="no sound autoencoder"):
        AudioVAEConfig.from_shapes({"vae.encoder.conv_in.conv.weight": (8, 48, 3, 3, 3)})


@pytest.mark.parametrize("change", [{"norm_type": "group"}, {"causality_axis": "width"}, {"attn_type": "linear"}])
def test_a_config_it_cannot_follow_is_refused(change) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        tiny(**change)


def test_mel_bins_are_looked_up_in_three_places() -> None:
    params = {"model": {"params": {"ddconfig": {"mel_bins": 32}}}}
    both = {**params, "preprocessing": {"mel": {"n_mel_channels": 48}}, "variables": {"mel_bins": 80}}
    assert AudioVAEConfig.from_dict(both).mel_bins == 32
    del both["model"]
    assert AudioVAEConfig.from_dict(both).mel_bins == 48
    assert AudioVAEConfig.from_dict({"variables": {"mel_bins": 80}}).mel_bins == 80


def test_filters_are_torchaudios() -> None:
    prepare_torchaudio()
    from torchaudio.functional import melscale_fbanks

    expected = melscale_fbanks(513, 0.0, 8000.0, 64, 16000, norm="slaney", mel_scale="slaney").T
    torch.testing.assert_close(mel_filters(64, 1024, 16000, 0.0, 8000.0), expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("seconds", "frames", "latents"), [(1.0, 101, 26), (2.0, 201, 51), (0.04, 5, 2)])
def test_lengths(seconds, frames, latents) -> None:
    config = tiny()
    samples = round(seconds * 16000)
    assert (config.mel_frames(samples), config.latent_length(samples)) == (frames, latents)
    mel = LogMel(config)(tone(seconds), 16000)
    assert mel.shape == (1, 2, frames, 64)
    encoded = encode_waveform(AudioEncoder(config).eval(), tone(seconds), 16000)
    assert encoded.shape == (1, 2, latents, 16)
    assert config.latents_per_second == 25
    assert AudioDecoder(config)(encoded).shape == (1, 2, 4 * latents - 3, 64)


def test_silence_is_the_floor_and_a_tone_peaks_at_its_pitch() -> None:
    log_mel = LogMel(tiny())
    silence = log_mel(torch.zeros(1, 2, 4000), 16000)
    torch.testing.assert_close(silence, torch.full_like(silence, math.log(1e-5)))
    left = log_mel(tone(0.5), 16000)[0, 0, 20]
    pitch = 440 * 3 / 200 / ((15 + 27 * math.log(8) / math.log(6.4)) / 65)  # in filter spacings
    assert abs(left.argmax().item() + 1 - pitch) <= 1


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_rate_gives_the_spectrogram_of_the_same_sound(rate) -> None:
    log_mel = LogMel(tiny())
    expected = log_mel(tone(0.5), 16000)
    actual = log_mel(tone(0.5, rate), rate)
    assert actual.shape == expected.shape
    loud = expected[..., 10:-10, :] > -2
    assert loud.any()
    torch.testing.assert_close(actual[..., 10:-10, :][loud], expected[..., 10:-10, :][loud], atol=0.1, rtol=0)


def test_resampled_length_is_rounded_up() -> None:
    assert resample(torch.zeros(1, 2, 22051), 44100, 16000).shape[-1] == math.ceil(22051 * 160 / 441)
    waveform = tone(0.1)
    assert resample(waveform, 16000, 16000) is waveform


def test_channels_become_two() -> None:
    mono, many = tone(0.1, channels=1), tone(0.1, channels=3)
    assert torch.equal(to_stereo(mono), mono.repeat(1, 2, 1))
    assert torch.equal(to_stereo(many), many.mean(dim=1, keepdim=True).repeat(1, 2, 1))
    assert to_stereo(tone(0.1)).shape[1] == 2


def test_short_sound_is_padded_and_none_refused(caplog) -> None:
    log_mel = LogMel(tiny())
    assert log_mel(torch.rand(1, 2, 512), 16000).shape == (1, 2, 7, 64)
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    caplog.clear()
    assert log_mel(torch.rand(1, 2, 513), 16000).shape == (1, 2, 4, 64)
    assert not caplog.records
    with pytest.raises(ValueError, match="no samples"):
        log_mel(torch.zeros(1, 2, 0), 16000)


def test_encoder_is_causal() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(tiny()).eval()
    mel = torch.randn(1, 2, 33, 64)
    with torch.no_grad():
        whole = encoder(mel)
        for latents in (1, 4, 7):
            part = encoder(mel[:, :, : 4 * (latents - 1) + 1])
            torch.testing.assert_close(part, whole[:, :, :latents], atol=1e-5, rtol=0)


def test_statistics_act_on_channel_and_bin() -> None:
    torch.manual_seed(0)
    encoder, decoder = AudioEncoder(tiny()).eval(), AudioDecoder(tiny()).eval()
    mel = torch.randn(1, 2, 9, 64)
    with torch.no_grad():
        plain = encoder(mel)
        mean, std = torch.randn(32), torch.rand(32) + 0.5
        reconstructed = decoder(plain)
        for model in (encoder, decoder):
            model.per_channel_statistics.get_buffer("mean-of-means").copy_(mean)
            model.per_channel_statistics.get_buffer("std-of-means").copy_(std)
        latents = encoder(mel)
        channel, bin_index = 1, 5
        index = channel * 16 + bin_index
        torch.testing.assert_close(
            latents[0, channel, :, bin_index], (plain[0, channel, :, bin_index] - mean[index]) / std[index]
        )
        torch.testing.assert_close(decoder(latents), reconstructed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_close(dtype, tolerance) -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(tiny()).eval()
    exact = encode_waveform(encoder, tone(0.3), 16000)
    half = encode_waveform(encoder.to(dtype), tone(0.3), 16000)
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < tolerance * exact.norm()


def test_overflow_in_half_precision_is_redone_in_float32(caplog) -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(tiny()).eval()
    for block in encoder.down[0].block:
        block.conv2.conv.weight.data.mul_(1e5)
    exact = encode_waveform(encoder, tone(0.3), 16000)
    encoder.half()
    encoder.down[0].block[0].conv2.conv.weight.data.clamp_(-6e4, 6e4)
    latents = encode_waveform(encoder, tone(0.3), 16000)
    assert "float32" in caplog.text
    assert latents.dtype == torch.float16 and latents.isfinite().all() and exact.isfinite().all()
    assert next(encoder.parameters()).dtype == torch.float16


def test_attention_variants_run() -> None:
    config = tiny(mid_block_add_attention=True, attn_resolutions=[128])
    encoder, decoder = AudioEncoder(config), AudioDecoder(config)
    assert {"mid.attn_1.q.conv.weight", "down.1.attn.0.proj_out.conv.bias"} <= encoder.state_dict().keys()
    assert "up.1.attn.1.k.conv.weight" in decoder.state_dict()
    assert decoder(encoder(torch.randn(1, 2, 9, 64))).shape == (1, 2, 9, 64)
