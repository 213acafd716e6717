"""Mel front end, sound autoencoder and vocoders reproduce the golden tensors."""

from __future__ import annotations

import torch

from ltx2_tuner.models.audio_vae import (
    AudioDecoder,
    AudioEncoder,
    AudioVAEConfig,
    LogMel,
    decode_waveform,
    encode_waveform,
)
from ltx2_tuner.models.audio_vae.mel import resample
from ltx2_tuner.models.vocoder import Vocoder
from tests.golden.cases import Case, assert_close, golden, read_config, read_weights

MEL, LATENT, RESAMPLED = 2e-4, 5e-4, 1e-5
DECODED_MEL, WAVE = 5e-5, 2e-4
RATES = {"16k": 16000, "44k": 44100, "48k": 48000}


def load(kind: type, part: str, case: Case) -> AudioEncoder | AudioDecoder:
    model = kind(AudioVAEConfig.from_dict(read_config(case.checkpoint)["audio_vae"])).eval()
    weights = read_weights(case.checkpoint, f"audio_vae.{part}.")
    for name, value in read_weights(case.checkpoint, "audio_vae.per_channel_statistics.").items():
        weights[f"per_channel_statistics.{name}"] = value
    model.load_state_dict(weights)
    return model


def load_vocoder(case: Case) -> Vocoder:
    vocoder = Vocoder.from_config(read_config(case.checkpoint)["vocoder"]).eval()
    vocoder.load_state_dict(read_weights(case.checkpoint, "vocoder."))
    return vocoder


@golden("audio_*/encode")
def test_encode(case: Case) -> None:
    encoder = load(AudioEncoder, "encoder", case)
    log_mel = LogMel(encoder.config)
    for suffix, rate in RATES.items():
        wave = case.inputs[f"wave{suffix}"]
        if f"resampled{suffix}" in case.outputs:
            resampled = resample(wave, rate, encoder.config.sample_rate)
            assert_close(resampled, case.outputs[f"resampled{suffix}"], RESAMPLED, f"resampled{suffix}")
        assert_close(log_mel(wave, rate), case.outputs[f"mel{suffix}"], MEL, f"mel{suffix}")
        latents = encode_waveform(encoder, wave, rate)
        assert_close(latents, case.outputs[f"latent{suffix}"], LATENT, f"latent{suffix}")
    with torch.no_grad():
        assert_close(encoder(case.inputs["mel_random"]), case.outputs["latent_random"], LATENT, "latent_random")


@golden("audio_*/decode")
def test_decode(case: Case) -> None:
    decoder, vocoder = load(AudioDecoder, "decoder", case), load_vocoder(case)
    with torch.no_grad():
        mel = decoder(case.inputs["latent"])
        assert mel.shape[2] == case.settings["mel_frames"]
        assert vocoder.output_rate == case.settings["output_sampling_rate"]
        assert_close(mel, case.outputs["mel"], DECODED_MEL, "mel")
        assert_close(decode_waveform(decoder, vocoder, case.inputs["latent"]), case.outputs["wave"], WAVE, "wave")
        assert_close(vocoder(case.inputs["mel_direct"]), case.outputs["wave_direct"], WAVE, "wave_direct")


@golden("audio_23/decode")
def test_stages_of_the_extended_vocoder(case: Case) -> None:
    vocoder = load_vocoder(case)
    with torch.no_grad():
        low = vocoder.vocoder(case.inputs["mel_direct"])
        assert_close(low, case.outputs["stage1_direct"], WAVE, "stage1_direct")
        assert_close(vocoder.mel_stft(low), case.outputs["bwe_mel_direct"], MEL, "bwe_mel_direct")
