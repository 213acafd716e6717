"""Small random checkpoints in the layout of the released single files: for tests, trial runs and benchmarks."""

from __future__ import annotations

import json
import math
import os

import torch
from torch import Tensor, nn

from ltx2_tuner.checkpoint.keys import COMPONENTS, DIT
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltx2_tuner.models.text import TextConfig, TextConnectors
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.models.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from ltx2_tuner.models.vocoder import Vocoder
from ltx2_tuner.quantization import is_quantisable

_E4M3 = torch.float8_e4m3fn


def write_tiny_checkpoint(
    path: str | os.PathLike,
    version: str = "2.3",
    seed: int = 0,
    *,
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 16,
    audio_head_dim: int = 8,
    latent_channels: int = 8,
    text_hidden: int = 48,
    text_layers: int = 3,
    fp8: str | None = None,
    metadata: bool = True,
) -> None:
    """Write a complete checkpoint (a few MB) whose parts fit each other; the same arguments give the same bytes.

    Random weights are scaled so that every part answers with values of about 1. Sound latents have 2 channels of 16
    bins; text encoders of `text_hidden` channels and `text_layers` layers fit.

    Args:
        version: "2.0" or "2.3".
        layers: blocks of the transformer; `heads`, `head_dim` and `audio_head_dim` make its widths.
        fp8: None; "scaled" as in the official fp8 files (first block kept); "comfy" with `scale_weight` and the marker
            tensor; "plain" without scales.
        metadata: whether the file says its config.
    """
    config = tiny_config(version, layers, heads, head_dim, audio_head_dim, latent_channels, text_hidden)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for component, module in _modules(config, text_layers + 1).items():
        prefixes = COMPONENTS[component]
        for key, tensor in sorted(module.state_dict().items()):
            name = next(prefix + key[len(own) :] for prefix, own in reversed(prefixes) if key.startswith(own))
            if name not in tensors:  # statistics belong to the encoder and to the decoder
                value = _initial(key, tensor, generator)
                table = version == "2.0" and "scale_shift_table" in key
                tensors[name] = value.to(torch.bfloat16).to(torch.float32 if table else torch.bfloat16)
    if fp8 is not None:
        tensors = _as_fp8(tensors, fp8)
    described = {"config": json.dumps(config), "model_version": f"{version}.0", "format": "pt"}
    write_safetensors(path, tensors, described if metadata else {"format": "pt"})


def tiny_config(
    version: str, layers: int, heads: int, head_dim: int, audio_head_dim: int, latent_channels: int, text_hidden: int
) -> dict[str, dict]:
    """The `config` metadata of such a file."""
    if version not in ("2.0", "2.3"):
        raise ValueError(f"version is {version!r}; known are '2.0' and '2.3'")
    newer = version == "2.3"
    transformer = {
        "_class_name": "AVTransformer3DModel",
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio_head_dim,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "audio_in_channels": 32,
        "audio_out_channels": 32,
        "cross_attention_dim": heads * head_dim,
        "audio_cross_attention_dim": heads * audio_head_dim,
        "caption_channels": text_hidden,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20],
        "rope_type": "split",
        "frequencies_precision": "float64",
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "connector_num_layers": 2,
        "connector_num_learnable_registers": 128,
        "connector_positional_embedding_max_pos": [4096],
        "connector_attention_head_dim": head_dim if newer else 16,
        "connector_num_attention_heads": heads if newer else text_hidden // 16,
    }
    if newer:
        transformer |= {
            "cross_attention_adaln": True,
            "apply_gated_attention": True,
            "connector_apply_gated_attention": True,
            "audio_connector_attention_head_dim": audio_head_dim,
            "audio_connector_num_attention_heads": heads,
            "caption_proj_before_connector": True,
            "caption_projection_first_linear": False,
            "caption_proj_input_norm": False,
            "caption_projection_second_linear": False,
            "connector_learnable_registers_std": 1,
            "text_encoder_norm_type": "per_token_rms",
        }
    return {
        "transformer": transformer,
        "vae": _video_vae(newer, latent_channels),
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER_23 if newer else _VOCODER_20,
    }


def _video_vae(newer: bool, latent_channels: int) -> dict[str, object]:
    """One residual block between two changes of resolution; 32 x 32 pixels and 8 frames a latent, as released."""

    def stages(*steps: list) -> list[list]:
        blocks: list[list] = [["res_x", {"num_layers": 1}]]
        for step in steps:
            blocks += [step, ["res_x", {"num_layers": 1}]]
        return blocks

    encoder = stages(
        ["compress_space_res", {"multiplier": 2}],
        ["compress_time_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 1 if newer else 2}],
    )
    if newer:
        decoder = stages(
            ["compress_space", {"multiplier": 2}],
            ["compress_time", {"multiplier": 2}],
            ["compress_all", {"multiplier": 1}],
            ["compress_all", {"multiplier": 2}],
        )
        padding = {"spatial_padding_mode": "zeros"}
    else:
        decoder = stages(*[["compress_all", {"residual": True, "multiplier": 2}]] * 3)
        padding = {"encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "reflect"}
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "latent_channels": latent_channels,
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "causal_decoder": False,
        "timestep_conditioning": False,
        "decoder_base_channels": 4,
        "encoder_blocks": encoder,
        "decoder_blocks": decoder,
        **padding,
    }


_AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 2,
                "ch": 16,
                "ch_mult": [1, 2, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
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
_VOCODER_20 = {
    "upsample_initial_channel": 64,
    "resblock": "1",
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "stereo": True,
    "output_sampling_rate": 24000,
}
_SNAKE = {
    "resblock": "AMP1",
    "stereo": True,
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_initial_channel": 64,
}
_VOCODER_23 = {
    "vocoder": {
        **_SNAKE,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **_SNAKE,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 256,
        "num_mels": 64,
    },
}


def _modules(config: dict[str, dict], text_states: int) -> dict[str, nn.Module]:
    video, audio = VideoVAEConfig.from_dict(config["vae"]), AudioVAEConfig.from_dict(config["audio_vae"])
    separate = config["transformer"].get("caption_proj_before_connector", False)
    projection = f"text_embedding_projection.{'video_' if separate else ''}aggregate_embed.weight"
    width = text_states * config["transformer"]["caption_channels"]
    text = TextConfig.from_dict(config["transformer"], {projection: (1, width)})
    return {
        "transformer": LTXTransformer(TransformerConfig.from_dict(config["transformer"])),
        "text": TextConnectors(text),
        "video_encoder": VideoEncoder(video),
        "video_decoder": VideoDecoder(video),
        "audio_encoder": AudioEncoder(audio),
        "audio_decoder": AudioDecoder(audio),
        "vocoder": Vocoder.from_config(config["vocoder"]),
    }


def _initial(key: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A start value in float32: filters as they are, norms near 1, matrices by their number of inputs."""
    if key.endswith((".filter", "_basis")):
        return tensor.float()
    noise = torch.randn(tensor.shape, generator=generator)
    if key.endswith("std-of-means") or (tensor.dim() == 1 and key.endswith("norm.weight")):
        return 1 + 0.1 * noise
    if tensor.dim() == 1:  # biases, means, activation parameters
        return 0.1 * noise
    if "scale_shift_table" in key:
        return 0.3 * noise
    if key.endswith("learnable_registers"):
        return noise
    fan_in = tensor[:, 0].numel() if ".ups." in f".{key}" else tensor[0].numel()  # transposed convolutions
    return noise / math.sqrt(fan_in) * (0.3 if key.endswith("adaln_single.linear.weight") else 1.0)


def _as_fp8(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind not in ("scaled", "comfy", "plain"):
        raise ValueError(f"fp8 is {kind!r}; known are 'scaled', 'comfy' and 'plain'")
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if kind == "scaled":  # gates too, but no layer of the first block
            chosen = f"{DIT}transformer_blocks." in name and name.endswith(".weight") and tensor.dim() == 2
            chosen = chosen and f"{DIT}transformer_blocks.0." not in name
        else:
            chosen = is_quantisable(name, tensor.shape)
        if not chosen:
            continue
        base = name.removesuffix(".weight")
        scale = torch.ones(()) if kind == "plain" else tensor.float().abs().max() / 448
        stored[name] = (tensor.float() / scale).clamp(-448, 448).to(_E4M3)
        if kind == "scaled":
            stored |= {f"{base}.weight_scale": scale, f"{base}.input_scale": torch.tensor(0.01)}
        elif kind == "comfy":
            stored[f"{base}.scale_weight"] = scale.reshape(1)
    if kind == "comfy":
        stored[f"{DIT}scaled_fp8"] = torch.zeros(2).to(_E4M3)
    return stored
