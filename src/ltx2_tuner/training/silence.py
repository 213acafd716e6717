"""The sound latent that stands for silence, made by the latent caching script."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ltx2_tuner.data.cache_files import read_audio
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.modes.streams import audio_tokens

logger = logging.getLogger(__name__)
FILE_NAME = "ltx2_silence_latent.safetensors"


def find_silence(cache_directory: Path, width: int) -> torch.Tensor | None:
    """Tokens (T, C) of encoded silence, None (with one warning) where the file is missing.

    Args:
        width: channels of an audio token.

    Raises:
        UserError: the file is damaged or of another model.
    """
    path = cache_directory / FILE_NAME
    if not path.is_file():
        logger.warning("%s is missing: silence is trained as the zero latent; ltx2_cache_latents.py writes it", path)
        return None
    cache = read_audio(path)
    tokens = audio_tokens(cache.latents[None])[0, : max(cache.length, 1)]
    if tokens.shape[1] != width:
        raise UserError(
            f"{path}: its sound has {tokens.shape[1]} channels a step, the model takes {width}; "
            "run ltx2_cache_latents.py --ltx2_mode av again"
        )
    return tokens
