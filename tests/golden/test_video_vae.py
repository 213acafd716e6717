"""The video autoencoder reproduces the golden latents and pixels."""

from __future__ import annotations

import torch

from ltx2_tuner.models.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from ltx2_tuner.models.video_vae.tiling import TileConfig, decode, encode
from tests.golden.cases import Case, assert_close, golden, read_config, read_weights

TOLERANCE = 5e-5


def load(kind: type, part: str, case: Case) -> VideoEncoder | VideoDecoder:
    model = kind(VideoVAEConfig.from_dict(read_config(case.checkpoint)["vae"])).eval()
    weights = read_weights(case.checkpoint, f"vae.{part}.")
    for name, value in read_weights(case.checkpoint, "vae.per_channel_statistics.").items():
        weights[f"per_channel_statistics.{name}"] = value
    model.load_state_dict(weights)
    return model


@golden("video_vae_*/encode")
def test_encode(case: Case) -> None:
    encoder = load(VideoEncoder, "encoder", case)
    pixels = case.inputs["pixels"].float() / 127.5 - 1
    with torch.no_grad():
        for name, expected in case.outputs.items():
            count = name.removeprefix("latent_")
            if count == "batch2":
                clips = torch.cat([pixels[:, :, :9], pixels[:, :, -9:]])
            else:
                clips = pixels[:, :, : int(count)]
            assert_close(encoder(clips), expected, TOLERANCE, name)


@golden("video_vae_*/encode")
def test_encode_from_bytes_in_chunks(case: Case) -> None:
    encoder = load(VideoEncoder, "encoder", case)
    for chunk_size in (1, 2, 3, 8):
        latents = encode(encoder, case.inputs["pixels"], TileConfig(chunk_size=chunk_size))
        assert_close(latents, case.outputs[f"latent_{case.inputs['pixels'].shape[2]}"], TOLERANCE, str(chunk_size))


@golden("video_vae_*/decode")
def test_decode(case: Case) -> None:
    decoder = load(VideoDecoder, "decoder", case)
    with torch.no_grad():
        for name, latents in case.inputs.items():
            expected = case.outputs[name.replace("latent", "video")]
            assert_close(decoder(latents), expected, TOLERANCE, name)
            assert_close(decode(decoder, latents, TileConfig(chunk_size=2)), expected, TOLERANCE, f"{name} in chunks")
