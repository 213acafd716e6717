"""Short ids of the weights that cache files were made with, cheap on a 40 GB file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.safetensors_file import TensorEntry

SAMPLE_BYTES = 4096
_STATISTICS = ("per_channel_statistics.std-of-means", "per_channel_statistics.mean-of-means")


def component_id(checkpoint: Checkpoint, component: str) -> str:
    """16 hex digits that name the weights of a component: "video_encoder", "audio_encoder", "text", "transformer"...

    Hashed are name, dtype, shape and the first and last 4096 bytes of every tensor of the component, so files that
    differ elsewhere (a quantised transformer) share the id.
    """
    names = {
        key: name
        for key, name in checkpoint.component(component).items()
        if not key.startswith("per_channel_statistics.") or key in _STATISTICS  # files hold more, which nothing reads
    }
    entries = {key: checkpoint.entry(name) for key, name in names.items()}
    return fingerprint(entries, lambda key, start, length: checkpoint.read_range(names[key], start, length))


def fingerprint(entries: Mapping[str, TensorEntry], read: Callable[[str, int, int], bytes]) -> str:
    """16 hex digits over the tensors of a component, by the names that it knows them by.

    Args:
        read: `read(name, start, length)` gives raw bytes of a tensor, fewer where it ends.
    """
    digest = hashlib.sha256()
    for key in sorted(entries):
        entry = entries[key]
        digest.update(f"{key}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
        digest.update(read(key, 0, SAMPLE_BYTES))
        digest.update(read(key, max(entry.nbytes - SAMPLE_BYTES, 0), SAMPLE_BYTES))
    return digest.hexdigest()[:16]
