"""From cached items to one batch of tensors.

Legend: B batch, C channels, F/H/W latent frames, height, width; T audio steps, M mel bins; L text tokens, D width;
N pixel frames, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ltx2_tuner.data.cache_files import AudioCache, LatentCache, read_audio, read_latents, read_text
from ltx2_tuner.data.config import Dataset
from ltx2_tuner.data.inventory import CachedItem, quantized_steps
from ltx2_tuner.errors import UserError

Batch = dict[str, object]


def load_batch(
    dataset: Dataset,
    items: Sequence[CachedItem],
    *,
    timesteps: Sequence[float] | None = None,
    dino: bool = False,
    video_width: int | None = None,
) -> Batch:
    """Read the caches of items of one bucket and stack them.

    Args:
        timesteps: one stratified draw in [0, 1) per item.
        dino: also read DINO features.
        video_width: width of the video text embedding, for caches that hold the joined form alone.

    Returns:
        latents: dict of latents (B, C, F, H, W), num_frames, height, width (B,) int32 in latent cells, fps (B,).
        conditions: dict of video_prompt_embeds (B, L, Dv), prompt_attention_mask (B, L), and, when every item has
            them, audio_prompt_embeds (B, L, Da) and dino_features (B, N, P, D).
        audio_latents: dict of latents (B, C, T, M), absent without sound; audio_lengths (B,) int32, 0 without sound.
        ref_latents, ref_audio_latents, ref_audio_lengths: the same of references, where the dataset has them.
        video_loss_weight, audio_loss_weight: where the dataset sets them. timesteps: list of B floats, or None.
        captions, item_keys: lists of B strings.

    Raises:
        UserError: a file is gone or damaged, or files of the batch do not fit together.
    """
    texts = [read_text(item.text_path, video_width) for item in items]
    batch: Batch = {
        "latents": _stack_latents([item.latent_path for item in items], dataset.model_fps),
        "conditions": _stack_conditions(items, texts, dino),
        "timesteps": None if timesteps is None else list(timesteps),
        "captions": [text.metadata.get("caption1", "") for text in texts],
        "item_keys": [item.key for item in items],
    }
    length = None
    if dataset.item_kind == "audio" and dataset.audio_bucket_strategy == "truncate":
        length = min(quantized_steps(item.audio_steps, "truncate", dataset.audio_bucket_interval) for item in items)
    batch |= _stack_audio([item.audio_path for item in items], "audio", length)
    if all(item.reference_path for item in items):
        batch["ref_latents"] = _stack_latents([item.reference_path for item in items], dataset.model_fps)
    if all(item.reference_audio_path for item in items):
        batch |= _stack_audio([item.reference_audio_path for item in items], "ref_audio", None)
    for name in ("video_loss_weight", "audio_loss_weight"):
        if getattr(dataset, name) is not None:
            batch[name] = getattr(dataset, name)
    return batch


def _stack(tensors: Sequence[torch.Tensor], paths: Sequence[Path]) -> torch.Tensor:
    """Tensors of equal shape on a new first axis.

    Raises:
        UserError: naming two files whose shapes differ.
    """
    for tensor, path in zip(tensors, paths):
        if tensor.shape != tensors[0].shape:
            raise UserError(
                f"{paths[0].name} {list(tensors[0].shape)} and {path.name} {list(tensor.shape)} cannot share a batch; "
                "run the caching script again, or use batch_size = 1"
            )
    return torch.stack(tuple(tensors))


def _stack_latents(paths: Sequence[Path], fps: float) -> dict[str, torch.Tensor]:
    caches: list[LatentCache] = [read_latents(path) for path in paths]
    sizes = [cache.virtual or tuple(cache.latents.shape[1:]) for cache in caches]
    frames, height, width = torch.tensor(sizes, dtype=torch.int32).unbind(dim=1)
    return {
        "latents": _stack([cache.latents for cache in caches], paths),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": torch.full((len(paths),), fps, dtype=torch.float32),
    }


def _stack_conditions(items: Sequence[CachedItem], texts: Sequence, dino: bool) -> dict[str, torch.Tensor]:
    paths = [item.text_path for item in items]
    conditions = {
        "video_prompt_embeds": _stack([text.video for text in texts], paths),
        "prompt_attention_mask": _stack([text.mask for text in texts], paths),
    }
    if all(text.audio is not None for text in texts):
        conditions["audio_prompt_embeds"] = _stack([text.audio for text in texts], paths)
    if dino and all(item.dino_path for item in items):
        features = [_read_dino(item.dino_path) for item in items]
        longest = max(feature.shape[0] for feature in features)
        padded = [torch.nn.functional.pad(f, (0, 0, 0, 0, 0, longest - f.shape[0])) for f in features]
        conditions["dino_features"] = _stack(padded, [item.dino_path for item in items])
    return conditions


def _read_dino(path: Path) -> torch.Tensor:
    """(N, P, D) features."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("dino_features")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run ltx2_cache_dino_features.py again") from error


def _stack_audio(paths: Sequence[Path | None], name: str, cut: int | None) -> Batch:
    """Sound latents padded with zeros to the longest, or all cut to `cut` steps; items without sound have length 0."""
    caches: list[AudioCache | None] = [read_audio(path) if path else None for path in paths]
    present = [(path, cache) for path, cache in zip(paths, caches) if cache is not None]
    lengths = torch.tensor(
        [0 if cache is None else cut or cache.length for cache in caches],
        dtype=torch.int32,
    )
    if not present:
        return {f"{name}_lengths": lengths}
    first_path, first = present[0]
    channels, _, bins = first.latents.shape
    for path, cache in present:
        if (cache.latents.shape[0], cache.latents.shape[2]) != (channels, bins):
            raise UserError(
                f"{first_path.name} {list(first.latents.shape)} and {path.name} {list(cache.latents.shape)} differ in "
                "channels or mel bins; run ltx2_cache_latents.py again for both"
            )
    steps = cut or max(cache.latents.shape[1] for _, cache in present)
    stacked = first.latents.new_zeros((len(paths), channels, steps, bins))
    for row, cache in enumerate(caches):
        if cache is not None:
            kept = cache.latents[:, :steps]
            stacked[row, :, : kept.shape[1]] = kept.to(stacked.dtype)
    return {f"{name}_latents": {"latents": stacked}, f"{name}_lengths": lengths}
