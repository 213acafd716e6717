"""Reading and writing cache files: latents, sound latents, text embeddings.

Legend: C channels, F/H/W latent frames, height, width; T audio steps, M mel bins; L text tokens, D width.

Tensors that are not finite are refused, so that a bad encode fails its item instead of poisoning the training. Key
names carry the dtype (`latents_7x17x30_bfloat16`); readers also take the short forms that older caches have.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors

ARCHITECTURE = "ltx2_v1"
FORMAT_VERSION = "1.0.1"

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
_SHAPED = re.compile(r"(?P<kind>latents|audio_latents)_(?P<sizes>\d+x\d+x\d+)")
_VIRTUAL = ("ltx2_virtual_num_frames", "ltx2_virtual_height", "ltx2_virtual_width")
# Width of the joined embedding -> width of its video part, for caches that hold the joined form alone.
_JOINED_WIDTHS = {7680: 3840, 6144: 4096}


class NonFiniteError(UserError):
    """A tensor that was to be cached holds NaN or infinity: the item fails and no file is written."""


@dataclass(frozen=True)
class LatentCache:
    """A latent file: `latents` (C, F, H, W); `virtual` (frames, height, width) in latent cells for sound items."""

    latents: torch.Tensor
    virtual: tuple[int, int, int] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AudioCache:
    """A sound latent file: `latents` (C, T, M), of which the first `length` steps are real."""

    latents: torch.Tensor
    length: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TextCache:
    """A text file: `video` (L, Dv), `audio` (L, Da) or None, `mask` (L,)."""

    video: torch.Tensor
    audio: torch.Tensor | None
    mask: torch.Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheHeader:
    """What a cache file says about itself: tensor shapes by name without dtype, and the metadata.

    `shape` is that of the main tensor: (C, F, H, W), (C, T, M) or (L, Dv).
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    shape: tuple[int, ...]

    @property
    def is_ours(self) -> bool:
        """Whether the file was made for this model family."""
        return self.metadata.get("architecture") == ARCHITECTURE


def dtype_token(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16, as written in key names."""
    return str(dtype).removeprefix("torch.")


def split_dtype(key: str) -> tuple[str, torch.dtype | None]:
    """A key without its dtype suffix, and that dtype (None when the key has no such suffix)."""
    for token, dtype in _DTYPES.items():
        if key.endswith(f"_{token}"):
            return key.removesuffix(f"_{token}"), dtype
    return key, None


def write_latents(
    path: Path, latents: torch.Tensor, metadata: Mapping[str, str], virtual: tuple[int, int, int] | None = None
) -> None:
    """Write a latent file.

    Args:
        latents: (C, F, H, W); for sound items the (C, 1, 1, 1) placeholder.
        metadata: see `data.metadata`; architecture and format version are added.
        virtual: (frames, height, width) in latent cells, for sound items.

    Raises:
        NonFiniteError: nothing is written.
    """
    frames, height, width = latents.shape[1:]
    tensors = {f"latents_{frames}x{height}x{width}_{dtype_token(latents.dtype)}": latents}
    if virtual is not None:
        tensors |= {f"{name}_int32": torch.tensor(value, dtype=torch.int32) for name, value in zip(_VIRTUAL, virtual)}
    _write(path, tensors, metadata)


def write_audio(path: Path, latents: torch.Tensor, metadata: Mapping[str, str], length: int | None = None) -> None:
    """Write a sound latent file; `latents` (C, T, M), `length` real steps (default: all).

    Raises:
        NonFiniteError: nothing is written.
    """
    channels, steps, bins = latents.shape
    tensors = {
        f"audio_latents_{steps}x{bins}x{channels}_{dtype_token(latents.dtype)}": latents,
        "audio_lengths_int32": torch.tensor(steps if length is None else length, dtype=torch.int32),
    }
    _write(path, tensors, metadata)


def write_text(
    path: Path,
    video: torch.Tensor,
    audio: torch.Tensor | None,
    mask: torch.Tensor,
    metadata: Mapping[str, str],
    *,
    legacy_keys: bool = False,
) -> None:
    """Write a text file; `video` (L, Dv), `audio` (L, Da) or None, `mask` (L,).

    Args:
        legacy_keys: also write the joined copy that other tools read (doubles the file).

    Raises:
        NonFiniteError: nothing is written.
    """
    tensors = {f"video_prompt_embeds_{dtype_token(video.dtype)}": video, "prompt_attention_mask": mask}
    if audio is not None:
        tensors[f"audio_prompt_embeds_{dtype_token(audio.dtype)}"] = audio
    if legacy_keys:
        joined = video if audio is None else torch.cat((video, audio), dim=-1)
        tensors |= {f"text_{dtype_token(joined.dtype)}": joined, "text_mask": mask.clone()}
    _write(path, tensors, metadata)


def write_dino(path: Path, features: torch.Tensor, metadata: Mapping[str, str]) -> None:
    """Write DINO features (pixel frames, patches, width).

    Raises:
        NonFiniteError: nothing is written.
    """
    _write(path, {"dino_features": features}, metadata)


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
        if bad:
            raise NonFiniteError(
                f"{Path(path).name}: {bad} of {tensor.numel()} values of {split_dtype(name)[0]} are NaN or infinite; "
                "nothing was written, try a wider dtype such as float32"
            )
    header = {"architecture": ARCHITECTURE, "format_version": FORMAT_VERSION}
    write_safetensors(path, tensors, header | {key: str(value) for key, value in metadata.items()})


def read_latents(path: Path) -> LatentCache:
    """Read a latent file.

    Raises:
        UserError: damaged, or not a latent file.
    """
    with _open(path) as (file, names):
        key = _shaped_key(file, names, "latents", path)
        virtual = None
        if all(name in names for name in _VIRTUAL):
            virtual = tuple(int(file.get_tensor(names[name])) for name in _VIRTUAL)
            if min(virtual) < 1:
                raise UserError(f"{path}: virtual geometry {virtual} makes no sense; run ltx2_cache_latents.py again")
        return LatentCache(file.get_tensor(key), virtual, file.metadata() or {})


def read_audio(path: Path) -> AudioCache:
    """Read a sound latent file.

    Raises:
        UserError: damaged, or not a sound latent file.
    """
    with _open(path) as (file, names):
        latents = file.get_tensor(_shaped_key(file, names, "audio_latents", path))  # (C, T, M)
        steps = latents.shape[1]
        length = int(file.get_tensor(names["audio_lengths"])) if "audio_lengths" in names else steps
        return AudioCache(latents, min(max(length, 0), steps), file.metadata() or {})


def read_text(path: Path, video_width: int | None = None) -> TextCache:
    """Read a text file; a joined embedding alone is split at `video_width` (default: that of the released models).

    Raises:
        UserError: damaged, or not a text file.
    """
    with _open(path) as (file, names):
        mask_name = "prompt_attention_mask" if "prompt_attention_mask" in names else "text_mask"
        main = "video_prompt_embeds" if "video_prompt_embeds" in names else "text"
        if main not in names or mask_name not in names:
            raise UserError(f"{path}: no text embeddings in it; run ltx2_cache_text_encoder_outputs.py again")
        video, audio = file.get_tensor(names[main]), None
        if main == "video_prompt_embeds":
            audio = file.get_tensor(names["audio_prompt_embeds"]) if "audio_prompt_embeds" in names else None
        else:
            video, audio = _split_joined(video, video_width)
        mask = file.get_tensor(names[mask_name])
        if video.ndim != 2 or mask.shape != video.shape[:1]:
            raise UserError(f"{path}: embeddings {list(video.shape)} and mask {list(mask.shape)} do not fit together")
        return TextCache(video, audio, mask, file.metadata() or {})


def _split_joined(joined: torch.Tensor, video_width: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(L, Dv + Da) -> (L, Dv), (L, Da); an embedding as wide as the video part is that part alone."""
    width = joined.shape[-1]
    split = video_width or _JOINED_WIDTHS.get(width, width)
    if width <= split:
        return joined, None
    return joined[:, :split].contiguous(), joined[:, split:].contiguous()


def read_header(path: Path) -> CacheHeader:
    """Shapes and metadata of a cache file of any kind, without its tensor data.

    Raises:
        UserError: damaged, or no cache file.
    """
    with _open(path) as (file, names):
        shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()}
        for kind in ("latents", "audio_latents"):
            if any(name.startswith(f"{kind}_") for name in names):
                key = _shaped_key(file, names, kind, path)
                return CacheHeader(path, shapes, file.metadata() or {}, tuple(file.get_slice(key).get_shape()))
        main = next((name for name in ("video_prompt_embeds", "text", "dino_features") if name in shapes), None)
        if main is None:
            raise UserError(f"{path}: not a cache file of this tool; remove it or move it elsewhere")
        return CacheHeader(path, shapes, file.metadata() or {}, shapes[main])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[safe_open, dict[str, str]]]:
    """An open file and its keys by name without dtype suffix."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            names = {split_dtype(key)[0]: key for key in keys}
            if len(names) < len(keys):
                raise UserError(f"{path}: holds one tensor twice; delete it and run the caching script again")
            yield file, names
    except FileNotFoundError:
        raise UserError(f"{path}: the cache file is gone; run the caching script again") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: damaged cache file ({error}); delete it and run the caching script again") from error


def _shaped_key(file: safe_open, names: dict[str, str], kind: str, path: Path) -> str:
    """The one key of `kind`, whose name must agree with the tensor's shape and dtype."""
    found = [name for name in names if name.startswith(f"{kind}_") and name != "audio_lengths"]
    if len(found) != 1:
        raise UserError(f"{path}: expected one {kind} tensor, found {len(found)}; run ltx2_cache_latents.py again")
    match = _SHAPED.fullmatch(found[0])
    shape = file.get_slice(names[found[0]]).get_shape()
    sizes = [int(size) for size in match["sizes"].split("x")] if match else []
    expected = shape[1:] if kind == "latents" else [*shape[1:], *shape[:1]]
    if sizes != list(expected):
        raise UserError(
            f"{path}: the name '{names[found[0]]}' does not fit a tensor of shape {list(shape)}; "
            "delete the file and run ltx2_cache_latents.py again"
        )
    return names[found[0]]
