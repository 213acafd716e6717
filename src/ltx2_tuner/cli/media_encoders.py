"""Encodes what prompts name (images, reference videos, reference sound), with encoders loaded only where needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ltx2_tuner.caching.sound import SoundLatents
from ltx2_tuner.checkpoint import Checkpoint, load_audio_encoder, load_video_encoder
from ltx2_tuner.media.audio import read_audio
from ltx2_tuner.sampling.conditioning import Conditioning, encode_media, wants_pictures, wants_sound
from ltx2_tuner.sampling.options import Request, SamplingOptions
from ltx2_tuner.sampling.preview import release_memory


def encode_conditionings(
    requests: Sequence[Request],
    options: SamplingOptions,
    checkpoint: Checkpoint,
    *,
    vae: str | None,
    device: torch.device,
    vae_dtype: torch.dtype,
) -> list[Conditioning]:
    """The conditioning of every request; the encoders are gone when it returns.

    Args:
        vae: other file for the video autoencoder.
    """
    pictures = sound = None
    if wants_pictures(requests):
        pictures = load_video_encoder(Checkpoint.open(vae) if vae else checkpoint, device, vae_dtype)
    if wants_sound(requests):
        sound = _sound_encoder(checkpoint, device)
    found = encode_media(requests, options, pictures, sound)
    del pictures, sound
    release_memory()
    return found


def _sound_encoder(checkpoint: Checkpoint, device: torch.device) -> Callable[[str], torch.Tensor]:
    latents = SoundLatents(load_audio_encoder(checkpoint, device, torch.float32))
    return lambda path: latents.encode(*read_audio(path))[None]
