"""The checkpoint's configuration: the file's own `config`, completed by what its tensors show.

Sizes come from shapes, everything else stays open: the models' own defaults are the values of the released files (not
those of the reference classes, which would silently switch off the audio-video gates and the text positions).
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping

from ltx2_tuner.checkpoint.keys import DIT
from ltx2_tuner.models import audio_vae, video_vae, vocoder

Shapes = Mapping[str, tuple[int, ...]]

_CAPTION_KEYS_23 = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}
_OTHER_SECTIONS = {
    "vae": video_vae.infer_section,
    "audio_vae": audio_vae.infer_section,
    "vocoder": vocoder.infer_section,
}


def complete_config(given: Mapping[str, object], shapes: Shapes) -> dict[str, dict]:
    """The sections transformer, vae, audio_vae and vocoder for the components that are there.

    Args:
        given: the file's own config, possibly empty.
        shapes: canonical tensor name -> shape.
    """
    config = copy.deepcopy({key: value for key, value in given.items() if isinstance(value, dict)})
    if "transformer" in config:
        config["transformer"] = _weight_facts(shapes) | config["transformer"]
    elif any(name.startswith(f"{DIT}transformer_blocks.") for name in shapes):
        config["transformer"] = _sizes(shapes) | _weight_facts(shapes)
    for section, infer in _OTHER_SECTIONS.items():
        own = {name.removeprefix(f"{section}."): shapes[name] for name in shapes if name.startswith(f"{section}.")}
        if own and section not in config:
            # Of no known kind: the loader says so if this component is asked for.
            with contextlib.suppress(ValueError, LookupError, ZeroDivisionError):
                config[section] = infer(own)
    return config


def _weight_facts(shapes: Shapes) -> dict[str, object]:
    """Switches of the transformer that its tensors decide; they stand in for keys that the config lacks."""
    facts: dict[str, object] = {}
    for stream in ("", "audio_"):
        modulation = shapes.get(f"{DIT}{stream}adaln_single.linear.weight")
        if modulation:
            facts["cross_attention_adaln"] = modulation[0] == 9 * modulation[1]
            facts["apply_gated_attention"] = any(
                name.startswith(f"{DIT}transformer_blocks.") and name.endswith("to_gate_logits.weight")
                for name in shapes
            )
            if f"{DIT}{stream}caption_projection.linear_1.weight" not in shapes:
                facts |= _CAPTION_KEYS_23
        if f"{DIT}transformer_blocks.0.{stream}ff.net.0.proj.weight" in shapes:
            facts[f"{stream}ff_bias"] = f"{DIT}transformer_blocks.0.{stream}ff.net.0.proj.bias" in shapes
    if f"{DIT}keyframes_abs_pos_embedding" in shapes:
        facts["use_keyframes_abs_pos_embedding"] = True
    return facts


def _sizes(shapes: Shapes) -> dict[str, object]:
    """Widths and depth of the transformer; the gates show the number of heads, without gates it is 32."""
    video = shapes.get(f"{DIT}patchify_proj.weight", (4096, 128))
    audio = shapes.get(f"{DIT}audio_patchify_proj.weight", (2048, 128))
    gates = (f"{DIT}transformer_blocks.0.{stream}attn1.to_gate_logits.weight" for stream in ("", "audio_"))
    heads = next((shapes[gate][0] for gate in gates if gate in shapes), 32)
    blocks = re.compile(re.escape(DIT) + r"transformer_blocks\.(\d+)\.")
    sizes = {
        "num_layers": 1 + max((int(match[1]) for name in shapes if (match := blocks.match(name))), default=-1),
        "num_attention_heads": heads,
        "attention_head_dim": video[0] // heads,
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio[0] // heads,
        "in_channels": video[1],
        "out_channels": video[1],
        "audio_in_channels": audio[1],
        "audio_out_channels": audio[1],
        "cross_attention_dim": video[0],
        "audio_cross_attention_dim": audio[0],
        "connector_positional_embedding_max_pos": [4096],
    }
    for stream in ("", "audio_"):
        caption = shapes.get(f"{DIT}{stream}caption_projection.linear_1.weight")
        if caption:
            sizes["caption_channels"] = caption[1]
    return sizes
