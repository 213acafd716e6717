"""--precache_sample_latents: what the prompts of a prompt file condition on, as latents in one side file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner.caching.encoders import VideoLatents
from ltx2_tuner.caching.sound import SoundLatents
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import atomic_write
from ltx2_tuner.media.audio import read_audio
from ltx2_tuner.sampling.conditioning import encode_media
from ltx2_tuner.sampling.options import Request, SamplingOptions

logger = logging.getLogger(__name__)

VERSION = 1
SPATIAL_FACTOR = 32


def write_sample_latents(
    path: Path,
    requests: Sequence[Request],
    options: SamplingOptions,
    video: VideoLatents,
    sound: SoundLatents | None,
    audio_dtype: torch.dtype,
) -> None:
    """Encode the media of every prompt that names some, and write them to `path`.

    Args:
        sound: encodes reference sound; None in mode video, where no sample uses it.

    Raises:
        UserError: a file that a prompt names cannot be used.
    """

    def encode_audio(source: str) -> torch.Tensor:
        return sound.encode(*read_audio(source))[None]

    media = encode_media(requests, options, video.encoder, encode_audio if sound else None)
    failures = [f"sample {request.index}: {found.failed}" for request, found in zip(requests, media) if found.failed]
    if failures:
        raise UserError(f"--precache_sample_latents: {'; '.join(failures)}")
    entries = []
    for request, found in zip(requests, media):
        prompt = request.prompt
        parts = {
            "image_path": prompt.image_path,
            "conditioning_latent": found.image,
            "v2v_ref_path": prompt.v2v_ref_path,
            "v2v_ref_latent": found.reference,
            "ref_audio_path": prompt.ref_audio_path if found.reference_audio is not None else None,
            "ref_audio_latent": found.reference_audio,
        }
        named = {name: value for name, value in parts.items() if value is not None}
        for name, value in named.items():
            if isinstance(value, torch.Tensor):
                named[name] = value.to(audio_dtype if name == "ref_audio_latent" else torch.bfloat16)
        if named:
            size = {"width": request.width, "height": request.height, "spatial_factor": SPATIAL_FACTOR}
            entries.append({"prompt_index": request.index, **size, **named})
    with atomic_write(path) as file:
        torch.save({"version": VERSION, "latent_cache": entries}, file)
    logger.info("%s: conditioning of %d of %d prompts", path, len(entries), len(requests))
