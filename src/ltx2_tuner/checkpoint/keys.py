"""Tensor names of the files in circulation, brought to those of the single-file checkpoints.

A file may hold everything under `model.diffusion_model.`, `vae.`, ... or only one component, with another prefix or
none (spec: prefix normalisation). Behind this module there is one spelling, that of the single file.
"""

from __future__ import annotations

from collections.abc import Iterable

DIT = "model.diffusion_model."
TEXT_PROJECTION = "text_embedding_projection."
VIDEO_CONNECTOR = DIT + "video_embeddings_connector."
AUDIO_CONNECTOR = DIT + "audio_embeddings_connector."

_DIT_PREFIXES = (DIT, "diffusion_model.", "transformer.", "model.")
_DIT_ROOTS = frozenset(
    (
        "patchify_proj",
        "audio_patchify_proj",
        "adaln_single",
        "audio_adaln_single",
        "prompt_adaln_single",
        "audio_prompt_adaln_single",
        "caption_projection",
        "audio_caption_projection",
        "scale_shift_table",
        "audio_scale_shift_table",
        "proj_out",
        "audio_proj_out",
        "transformer_blocks",
        "keyframes_abs_pos_embedding",
        "video_embeddings_connector",
        "audio_embeddings_connector",
        "embeddings_connector",
        "scaled_fp8",
    )
)
_VIDEO_VAE_ROOTS = ("encoder.", "decoder.", "per_channel_statistics.")

# Component -> (prefix in the file, prefix in the module). The first that fits decides.
COMPONENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": ((DIT, ""),),
    "video_encoder": (("vae.encoder.", ""), ("vae.per_channel_statistics.", "per_channel_statistics.")),
    "video_decoder": (("vae.decoder.", ""), ("vae.per_channel_statistics.", "per_channel_statistics.")),
    "audio_encoder": (("audio_vae.encoder.", ""), ("audio_vae.per_channel_statistics.", "per_channel_statistics.")),
    "audio_decoder": (("audio_vae.decoder.", ""), ("audio_vae.per_channel_statistics.", "per_channel_statistics.")),
    "vocoder": (("vocoder.", ""),),
    "text": (
        (VIDEO_CONNECTOR, "video_embeddings_connector."),
        (AUDIO_CONNECTOR, "audio_embeddings_connector."),
        (TEXT_PROJECTION, TEXT_PROJECTION),
    ),
}


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the file -> name in the single-file layout; unknown names stay as they are."""
    names = list(names)
    bare_video_vae = not any(name.startswith("vae.") for name in names)
    return {name: _canonical(name, bare_video_vae) for name in names}


def component_key(name: str, component: str) -> str | None:
    """The module's key of a canonical tensor name, None when the tensor belongs to another component."""
    if component == "transformer" and name.startswith((VIDEO_CONNECTOR, AUDIO_CONNECTOR)):
        return None
    for prefix, replacement in COMPONENTS[component]:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return None


def _canonical(name: str, bare_video_vae: bool) -> str:
    for prefix in ("", *_DIT_PREFIXES):
        rest = name.removeprefix(prefix)
        root = rest.split(".", 1)[0]
        if (not prefix or rest != name) and (root in _DIT_ROOTS or root.startswith("av_ca_")):
            if root == "embeddings_connector":  # single-modality layout of the first files
                rest = "video_" + rest
            return DIT + rest
        if rest.startswith(TEXT_PROJECTION):
            return rest
    if bare_video_vae and name.startswith(_VIDEO_VAE_ROOTS):
        return "vae." + name
    return name
