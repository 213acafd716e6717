"""Which weights of a checkpoint are quantised: the big matrices of the transformer blocks, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

# The 28 projections of an audio-video block: q, k, v, out of six attentions and four feed-forward matrices.
_KEPT = (
    "norm",
    "scale_shift_table",
    "patchify_proj",
    "proj_out",
    "adaln_single",
    "caption_projection",
    "to_gate_logits",
)


def is_quantisable(name: str, shape: Sequence[int]) -> bool:
    """Whether the tensor `name` (with any prefix) is one that fp8 and nf4 bases store quantised."""
    return (
        "transformer_blocks." in name
        and name.endswith(".weight")
        and len(shape) == 2
        and not any(part in name for part in _KEPT)
    )
