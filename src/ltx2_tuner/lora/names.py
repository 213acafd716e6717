"""The names of one linear layer in the LoRA files that are in circulation, and the table that inverts them.

A layer's path is its dotted name in the official checkpoint below `model.diffusion_model.`, such as
`transformer_blocks.0.attn1.to_out.0` or `video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q`.

kohya's names replace dots by underscores, which cannot be undone by string rules; a table built from the paths that
exist (a model's own, or the fixed list of LTX-2's layers) undoes it. Block numbers are cut out of the keys of the
table, so the fixed list serves models of any depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

KOHYA_PREFIX = "lora_unet_model_"
COMFY_PREFIX = "diffusion_model."

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
_MODULATIONS = (
    "adaln_single",
    "audio_adaln_single",
    "prompt_adaln_single",
    "audio_prompt_adaln_single",
    "av_ca_video_scale_shift_adaln_single",
    "av_ca_audio_scale_shift_adaln_single",
    "av_ca_a2v_gate_adaln_single",
    "av_ca_v2a_gate_adaln_single",
)
_CONNECTORS = ("video_embeddings_connector", "audio_embeddings_connector")

# Official prefix -> the name diffusers gives it; longer names first, because the first match counts.
_DIFFUSERS_PREFIXES = (
    ("audio_patchify_proj", "audio_proj_in"),
    ("patchify_proj", "proj_in"),
    ("audio_adaln_single", "audio_time_embed"),
    ("adaln_single", "time_embed"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    ("video_embeddings_connector.transformer_1d_blocks", "video_connector.transformer_blocks"),
    ("audio_embeddings_connector.transformer_1d_blocks", "audio_connector.transformer_blocks"),
    ("text_embedding_projection.aggregate_embed", "text_proj_in"),
    ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
    ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
)
_BLOCK_NUMBER = re.compile(r"(transformer(?:_1d)?_blocks)([._])(\d+)(?=[._])")


def static_paths() -> list[str]:
    """Every linear layer of LTX-2.0 and 2.3, with `0` for each block number."""
    paths = [f"transformer_blocks.0.{attention}.{p}" for attention in _ATTENTIONS for p in _PROJECTIONS]
    paths += [f"transformer_blocks.0.{ff}.{layer}" for ff in ("ff", "audio_ff") for layer in ("net.0.proj", "net.2")]
    paths += ["patchify_proj", "audio_patchify_proj", "proj_out", "audio_proj_out"]
    for modulation in _MODULATIONS:
        embedder = f"{modulation}.emb.timestep_embedder"
        paths += [f"{embedder}.linear_1", f"{embedder}.linear_2", f"{modulation}.linear"]
    paths += [f"{side}caption_projection.linear_{n}" for side in ("", "audio_") for n in (1, 2)]
    for connector in _CONNECTORS:
        block = f"{connector}.transformer_1d_blocks.0"
        paths += [f"{block}.attn1.{projection}" for projection in _PROJECTIONS]
        paths += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    paths += [f"text_embedding_projection.{side}aggregate_embed" for side in ("", "video_", "audio_")]
    return paths


def kohya_name(path: str) -> str:
    """`transformer_blocks.0.attn1.to_q` -> `lora_unet_model_transformer_blocks_0_attn1_to_q`.

    Connectors are written without `model_`, and the video connector without `video_`, as existing files do.
    """
    flat = path.replace(".", "_")
    if path.startswith(_CONNECTORS):
        return "lora_unet_" + flat.removeprefix("video_")
    return KOHYA_PREFIX + flat


def comfy_name(path: str) -> str:
    """The name in ComfyUI files and in those of the official trainer."""
    return COMFY_PREFIX + path


def diffusers_name(path: str) -> str:
    """The name in diffusers' LoRA files: `transformer.…`, for the text side `connectors.…`."""
    for official, renamed in _DIFFUSERS_PREFIXES:
        if path == official or path.startswith(official + "."):
            text_side = "connector" in official or official.startswith("text_")
            return ("connectors." if text_side else "transformer.") + renamed + path[len(official) :]
    return "transformer." + path


class NameTable:
    """From any spelling of a layer's name to its path.

    Args:
        paths: the paths that exist.
        exact: True takes the block numbers of `paths` as the only ones (a loaded model); False allows any.
    """

    def __init__(self, paths: Iterable[str], *, exact: bool) -> None:
        self._paths = frozenset(paths)
        self._exact = exact
        self._templates: dict[str, str] = {}
        for path in self._paths:
            template, _ = _cut_number(path)
            for spelling in _spellings(path):
                self._templates[_cut_number(spelling)[0]] = template

    @classmethod
    def static(cls) -> NameTable:
        """The table for use without a model: all layers of LTX-2.0 and 2.3, blocks of any number."""
        return cls(static_paths(), exact=False)

    def resolve(self, name: str) -> str | None:
        """The path of the layer that a file calls `name`, or None when there is no such layer."""
        key, number = _cut_number(name)
        template = self._templates.get(key)
        if template is None:
            return None
        path = template if number is None else template.replace("{}", number, 1)
        return path if not self._exact or path in self._paths else None


def _spellings(path: str) -> Iterable[str]:
    flat = path.replace(".", "_")
    diffusers = diffusers_name(path)
    yield from (path, COMFY_PREFIX + path, "model." + COMFY_PREFIX + path, "base_model.model." + path)
    yield from (diffusers, diffusers.partition(".")[2], "transformer." + path)
    yield from ("lora_unet_" + flat, KOHYA_PREFIX + flat, "lora_unet_" + diffusers.partition(".")[2].replace(".", "_"))
    if path.startswith("video_embeddings_connector"):
        bare, bare_flat = path.removeprefix("video_"), flat.removeprefix("video_")
        yield from (COMFY_PREFIX + bare, "lora_unet_" + bare_flat, KOHYA_PREFIX + bare_flat)


def _cut_number(name: str) -> tuple[str, str | None]:
    """The name with its block number replaced by `{}`, and that number."""
    match = _BLOCK_NUMBER.search(name)
    if match is None:
        return name, None
    return name[: match.start(3)] + "{}" + name[match.end(3) :], match.group(3)
