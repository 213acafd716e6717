"""The checkpoint's configuration: the file's own `config`, completed by what its tensors show.

Files without that metadata get the values of the released models (spec: the `config` object), never the defaults of
the reference classes: those would silently switch off the audio-video gates and the text positions.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping

from ltx2_tuner.checkpoint.keys import DIT
from ltx2_tuner.models.video_vae import infer_section

Shapes = Mapping[str, tuple[int, ...]]

_TRANSFORMER = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "caption_channels": 3840,
    "norm_eps": 1e-6,
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "rope_type": "split",
    "frequencies_precision": "float64",
    "use_middle_indices_grid": True,
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "connector_positional_embedding_max_pos": [4096],
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "cross_attention_norm": True,
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
}
_CAPTION_KEYS_23 = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}
_AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 8,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
_RESBLOCKS = {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3}
_VOCODER_20 = {
    **_RESBLOCKS,
    "upsample_initial_channel": 1024,
    "resblock": "1",
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "stereo": True,
    "output_sampling_rate": 24000,
}
_SNAKE = {
    **_RESBLOCKS,
    "resblock": "AMP1",
    "stereo": True,
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
_VOCODER_23 = {
    "vocoder": {
        **_SNAKE,
        "upsample_initial_channel": 1536,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **_SNAKE,
        "upsample_initial_channel": 512,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 512,
        "win_size": 512,
        "num_mels": 64,
    },
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
        config["transformer"] = _TRANSFORMER | _sizes(shapes) | _weight_facts(shapes)
    roots = {name.split(".", 1)[0] for name in shapes}
    if "vae" not in config and "vae" in roots:
        with contextlib.suppress(ValueError):  # no known video autoencoder: its loader says so when it is asked for
            config["vae"] = infer_section({name: shape for name, shape in shapes.items() if name.startswith("vae.")})
    if "audio_vae" not in config and "audio_vae" in roots:
        config["audio_vae"] = copy.deepcopy(_AUDIO_VAE)
    if "vocoder" not in config and "vocoder" in roots:
        extended = any(name.startswith("vocoder.bwe_generator.") for name in shapes)
        config["vocoder"] = copy.deepcopy(_VOCODER_23 if extended else _VOCODER_20)
    return config


def _weight_facts(shapes: Shapes) -> dict[str, object]:
    """Switches of the transformer that its tensors decide; they stand in for keys that the config lacks."""
    facts: dict[str, object] = {}
    for stream, side in (("", "video"), ("audio_", "audio")):
        modulation = shapes.get(f"{DIT}{stream}adaln_single.linear.weight")
        if modulation:
            facts["cross_attention_adaln"] = modulation[0] // modulation[1] == 9
            facts["apply_gated_attention"] = any(
                name.startswith(f"{DIT}transformer_blocks.") and name.endswith("to_gate_logits.weight")
                for name in shapes
            )
            if f"{DIT}{stream}caption_projection.linear_1.weight" not in shapes:
                facts |= _CAPTION_KEYS_23
        if f"{DIT}transformer_blocks.0.{stream}ff.net.0.proj.weight" in shapes:
            key = "ff_bias" if side == "video" else "audio_ff_bias"
            facts[key] = f"{DIT}transformer_blocks.0.{stream}ff.net.0.proj.bias" in shapes
    if f"{DIT}keyframes_abs_pos_embedding" in shapes:
        facts["use_keyframes_abs_pos_embedding"] = True
    return facts


def _sizes(shapes: Shapes) -> dict[str, object]:
    """Widths and depth of the transformer; the gates show the number of heads, without gates it is 32."""
    video = shapes.get(f"{DIT}patchify_proj.weight", (4096, 128))
    audio = shapes.get(f"{DIT}audio_patchify_proj.weight", (2048, 128))
    gates = (f"{DIT}transformer_blocks.0.{name}attn1.to_gate_logits.weight" for name in ("", "audio_"))
    heads = next((shapes[gate][0] for gate in gates if gate in shapes), 32)
    sizes = {
        "num_layers": _count_blocks(shapes, f"{DIT}transformer_blocks."),
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
    }
    caption = shapes.get(f"{DIT}caption_projection.linear_1.weight")
    if caption:
        sizes["caption_channels"] = caption[1]
    return sizes


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for name in shapes if (match := pattern.match(name))), default=-1)
