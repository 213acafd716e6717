"""Media that a prompt names, as latents: first-frame images, reference videos, reference sound."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.media.errors import MediaError
from ltx2_tuner.media.images import read_image
from ltx2_tuner.media.resize import cover_crop
from ltx2_tuner.media.video import read_frames
from ltx2_tuner.models.video_vae import tiling
from ltx2_tuner.sampling.contexts import load_container
from ltx2_tuner.sampling.options import Request, SamplingOptions
from ltx2_tuner.sampling.prompts import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

RECACHE = "re-run ltx2_cache_latents.py with --precache_sample_latents and this prompt file"


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Latents of one prompt's media, on the CPU; absent ones are None.

    Attributes:
        image: (1, C, 1, H, W) first frame.
        small_image: the same at half size, for the first of two stages.
        reference: (1, C, Fr, Hr, Wr) in-context reference video.
        reference_audio: (1, C, Tr, bins) reference voice.
        failed: why the sample cannot be made, or None.
    """

    image: torch.Tensor | None = None
    small_image: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    reference_audio: torch.Tensor | None = None
    failed: str | None = None


def wants_pictures(requests: Sequence[Request]) -> bool:
    """Whether any prompt names an image or a reference video."""
    return any(request.prompt.image_path or request.prompt.v2v_ref_path for request in requests)


def wants_sound(requests: Sequence[Request]) -> bool:
    """Whether any prompt names reference sound."""
    return any(request.prompt.ref_audio_path for request in requests)


def image_pixels(path: str | Path, width: int, height: int) -> torch.Tensor:
    """(1, 3, 1, height, width) in [-1, 1]: an image scaled to cover the size and cropped to its centre."""
    return to_pixels(cover_crop(read_image(path), width, height)[None])


def reference_frames(path: str | Path, width: int, height: int, options: SamplingOptions) -> np.ndarray:
    """(N, height, width, 3) uint8: the reference scaled to cover the size and cropped to its centre.

    An image, or a clip shorter than `reference_frames`, is held on its last frame; the count is padded to 8n + 1.
    """
    count = options.reference_frames
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        frames = read_image(path)[None]
    else:
        frames = np.asarray(read_frames(path, range(count)))
    frames = cover_crop(frames, width, height)
    return hold_last(frames, count + (1 - count) % 8)


def reference_size(request: Request, options: SamplingOptions) -> tuple[int, int]:
    """Width and height in pixels of a request's reference."""
    factor = options.reference_downscale
    return max(request.width // factor // 32 * 32, 32), max(request.height // factor // 32 * 32, 32)


def hold_last(frames: np.ndarray, count: int) -> np.ndarray:
    """Repeat the last frame until there are `count`."""
    missing = max(count - len(frames), 0)
    return np.concatenate((frames, np.repeat(frames[-1:], missing, axis=0)))[:count]


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (1, 3, N, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def encode_media(
    requests: Sequence[Request],
    options: SamplingOptions,
    encoder: torch.nn.Module | None,
    encode_audio: Callable[[str], torch.Tensor] | None = None,
) -> list[Conditioning]:
    """Encode what the prompts name. A file that cannot be read fails its own sample alone.

    Args:
        encoder: a `VideoEncoder` on its device; None where no prompt names a picture.
        encode_audio: `path -> (1, C, T, bins)` for reference sound, or None where no mode uses it.
    """

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        parameter = next(encoder.parameters())
        encoded = tiling.encode(encoder, pixels.to(parameter.device, parameter.dtype), options.tiles)
        return encoded.float().cpu()

    result = []
    for request in requests:
        prompt = request.prompt
        try:
            image = small = reference = reference_audio = None
            if prompt.image_path:
                image = latents(image_pixels(prompt.image_path, request.width, request.height))
                if request.two_stage:
                    small = latents(image_pixels(prompt.image_path, request.width // 2, request.height // 2))
            if prompt.v2v_ref_path:
                size = reference_size(request, options)
                reference = latents(to_pixels(reference_frames(prompt.v2v_ref_path, *size, options)))
            if prompt.ref_audio_path and encode_audio is not None:
                reference_audio = encode_audio(prompt.ref_audio_path).float().cpu()
            result.append(Conditioning(image, small, reference, reference_audio))
        except (MediaError, UserError) as error:
            logger.error("sample %d is left out: %s", request.index, error)
            result.append(Conditioning(failed=str(error)))
    return result


def read_latent_cache(
    path: str | Path, requests: Sequence[Request], options: SamplingOptions, *, spatial_scale: int = 32
) -> list[Conditioning]:
    """Conditioning from `ltx2_sample_latents_cache.pt`.

    Raises:
        UserError: missing, damaged, or made for other prompts or sizes.
    """
    path = Path(path)
    entries = load_container(path, RECACHE).get("latent_cache")
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds no latent_cache list; {RECACHE}")
    by_index = {
        entry["prompt_index"]: entry
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("prompt_index"), int)
    }
    result = []
    for request in requests:
        entry = by_index.get(request.index, {})
        prompt = request.prompt
        image = _cached(path, request, entry, prompt.image_path, ("image_path",), ("conditioning_latent",))
        reference = _cached(path, request, entry, prompt.v2v_ref_path, ("v2v_ref_path",), ("v2v_ref_latent",))
        names = ("ref_audio_path", "reference_audio_path"), ("ref_audio_latent", "reference_audio_latent")
        sound = _cached(path, request, entry, prompt.ref_audio_path, *names)
        cells = (request.height // spatial_scale, request.width // spatial_scale)
        small = tuple(size // spatial_scale for size in reversed(reference_size(request, options)))
        for latent, wanted in ((image, cells), (reference, small)):
            if latent is not None and tuple(latent.shape[-2:]) != wanted:
                found = "x".join(map(str, latent.shape[-2:]))
                raise UserError(
                    f"{path}: sample {request.index} holds a latent of {found} cells, "
                    f"expected {wanted[0]}x{wanted[1]}; {RECACHE}"
                )
        result.append(Conditioning(image=image, reference=reference, reference_audio=sound))
    return result


def _cached(
    path: Path,
    request: Request,
    entry: dict,
    wanted: str | None,
    path_keys: tuple[str, ...],
    latent_keys: tuple[str, ...],
) -> torch.Tensor | None:
    if not wanted:
        return None
    found = next((entry[key] for key in path_keys if key in entry), None)
    latent = next((entry[key] for key in latent_keys if key in entry), None)
    if found != wanted or not isinstance(latent, torch.Tensor):
        raise UserError(f"{path}: sample {request.index} holds '{found}', the prompt names '{wanted}'; {RECACHE}")
    return latent.float()
