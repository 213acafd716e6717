"""The transformers of ltx-core and diffusers with the weights of a checkpoint, adjusted to what the goldens state.

Both packages take the noise level of the attention between the streams from elsewhere: ltx-core 1.0.0 from the other
stream's sigma throughout, diffusers from the own timesteps throughout. Here scales and shifts follow the own timesteps
and the gate follows the other stream's sigma.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.models.transformer import Modality
from tests.golden.cases import read_config, read_weights

PREFIX = "model.diffusion_model."
# Official names to those of diffusers, longest first.
DIFFUSERS_NAMES = {
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "prompt_adaln_single": "prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "patchify_proj": "proj_in",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
DIFFUSERS_STARTS = {"adaln_single.": "time_embed.", "audio_adaln_single.": "audio_time_embed."}


def ltx_core() -> types.SimpleNamespace:
    """The parts of ltx-core that the tests use; skips where it is not installed."""
    prepare_torchaudio()
    transformer = pytest.importorskip("ltx_core.model.transformer")
    from ltx_core import loader
    from ltx_core.guidance import perturbations
    from ltx_core.model.transformer import transformer_args

    return types.SimpleNamespace(
        transformer=transformer, loader=loader, perturbations=perturbations, arguments=transformer_args
    )


def adjust_ltx_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take scales and shifts of the attention between the streams from the own timesteps, for one test."""
    preprocessor = ltx_core().arguments.MultiModalTransformerArgsPreprocessor
    original = preprocessor.prepare

    def prepare(self: object, modality: object, cross_modality: object | None = None) -> object:
        arguments = original(self, modality, cross_modality)
        if cross_modality is None:
            return arguments
        timesteps = modality.timesteps * self.simple_preprocessor.timestep_scale_multiplier
        rows, _ = self.cross_scale_shift_adaln(timesteps.flatten(), hidden_dtype=modality.latent.dtype)
        rows = rows.view(modality.latent.shape[0], -1, rows.shape[-1])
        return dataclasses.replace(arguments, cross_scale_shift_timestep=rows)

    monkeypatch.setattr(preprocessor, "prepare", prepare)


def ltx_core_model(path: Path, *, video_only: bool = False, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """The transformer that ltx-core makes of a checkpoint; `options` go to its builder."""
    core = ltx_core()
    name = "LTXVideoOnlyModelConfigurator" if video_only else "LTXModelConfigurator"
    builder = core.loader.SingleGPUModelBuilder(
        model_path=str(path),
        model_class_configurator=getattr(core.transformer, name),
        model_sd_ops=core.transformer.LTXV_MODEL_COMFY_RENAMING_MAP,
        **options,
    )
    return builder.build(device=torch.device("cpu"), dtype=dtype).eval()


def ltx_core_modality(modality: Modality | None) -> object | None:
    """Our record of a stream as that of ltx-core."""
    if modality is None:
        return None
    names = ("latent", "sigma", "timesteps", "positions", "context", "enabled", "context_mask", "attention_mask")
    return ltx_core().transformer.Modality(**{name: getattr(modality, name) for name in names})


def diffusers_model(path: Path) -> nn.Module:
    """The transformer of diffusers with the weights of a checkpoint, float32."""
    prepare_torchaudio()
    diffusers = pytest.importorskip("diffusers")
    section = read_config(path)["transformer"]
    same = ("in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    same += ("cross_attention_dim", "caption_channels", "rope_type", "audio_in_channels", "audio_out_channels")
    same += ("audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim")
    gated, modulated = section.get("apply_gated_attention", False), section.get("cross_attention_adaln", False)
    model = diffusers.LTX2VideoTransformer3DModel(
        **{name: section[name] for name in same},
        rope_double_precision=section["frequencies_precision"] == "float64",
        gated_attn=gated,
        audio_gated_attn=gated,
        cross_attn_mod=modulated,
        audio_cross_attn_mod=modulated,
        use_prompt_embeddings=not section.get("caption_proj_before_connector", False),
        perturbed_attn=True,
    )
    weights = read_weights(path, PREFIX)
    weights = {diffusers_name(name): value for name, value in weights.items() if "_embeddings_connector." not in name}
    model.load_state_dict(weights)
    return model.eval()


def diffusers_name(name: str) -> str:
    """An official parameter name below the prefix, as diffusers has it."""
    for official, other in DIFFUSERS_STARTS.items():
        if name.startswith(official):
            return other + name.removeprefix(official)
    for official, other in DIFFUSERS_NAMES.items():
        name = name.replace(official, other)
    return name


def run_diffusers(model: nn.Module, video: Modality, audio: Modality, **options: object) -> tuple[Tensor, Tensor]:
    """Velocities of the transformer of diffusers for our inputs."""
    gates = {"av_cross_attn_video_a2v_gate": audio.sigma, "av_cross_attn_audio_v2a_gate": video.sigma}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_replace_first(1000 * sigma))
        for name, sigma in gates.items()
    ]
    try:
        return model(
            hidden_states=video.latent,
            audio_hidden_states=audio.latent,
            encoder_hidden_states=video.context,
            audio_encoder_hidden_states=audio.context,
            timestep=1000 * video.timesteps,
            audio_timestep=1000 * audio.timesteps,
            sigma=1000 * video.sigma,
            audio_sigma=1000 * audio.sigma,
            encoder_attention_mask=video.context_mask,
            audio_encoder_attention_mask=audio.context_mask,
            video_coords=video.positions,
            audio_coords=audio.positions,
            return_dict=False,
            **options,
        )
    finally:
        for hook in hooks:
            hook.remove()


def _replace_first(value: Tensor) -> Callable[[nn.Module, tuple], tuple]:
    return lambda _, arguments: (value, *arguments[1:])
