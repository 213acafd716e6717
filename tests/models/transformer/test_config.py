from __future__ import annotations

import pytest

from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from tests.models.transformer import tiny

FOUR_TEXT_KEYS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
}


def test_missing_keys_take_the_values_of_the_released_models() -> None:
    config = TransformerConfig.from_dict({})
    assert (config.num_layers, config.video_width, config.audio_width) == (48, 4096, 2048)
    assert config.gate_timestep_scale == 1000
    assert config.double_precision_frequencies
    assert config.rope_max_positions == (20, 2048, 2048)
    assert config.audio_in_channels == 128
    assert config.context_width("video") == config.context_width("audio") == 3840


def test_the_text_path_of_2_3_takes_contexts_of_stream_width() -> None:
    config = TransformerConfig.from_dict(FOUR_TEXT_KEYS)
    assert (config.context_width("video"), config.context_width("audio")) == (4096, 2048)


def test_a_repacked_file_with_two_of_the_text_keys_is_2_3() -> None:
    section = {"caption_projection_first_linear": False, "caption_projection_second_linear": False}
    assert TransformerConfig.from_dict(section).caption_proj_before_connector


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"use_middle_indices_grid": False}, "use_middle_indices_grid"),
        ({"positional_embedding_type": "absolute"}, "positional_embedding_type"),
        ({"audio_num_attention_heads": 16}, "audio_num_attention_heads is 16"),
        ({"rope_type": "spiral"}, "rope_type is 'spiral'"),
        ({"audio_attention_head_dim": 32}, "audio_cross_attention_dim is 2048"),
        (FOUR_TEXT_KEYS | {"caption_proj_input_norm": True}, "caption_proj_input_norm"),
        (FOUR_TEXT_KEYS | {"caption_proj_before_connector": False}, "caption_proj_before_connector"),
    ],
)
def test_values_of_other_architectures_are_refused_by_name(section: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TransformerConfig.from_dict(section)


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="'sound'"):
        LTXTransformer(tiny.config(), "sound")


@pytest.mark.parametrize(
    ("version", "variant", "tensors"),
    [("2.0", "av", 3510), ("2.0", "video", 1215), ("2.0", "audio", 1215), ("2.3", "av", 4186), ("2.3", "video", 1457)]
    + [("2.3", "audio", 1457), ("2.5", "av", 4091)],
)
def test_a_model_of_48_blocks_has_the_tensors_of_a_released_file(version: str, variant: str, tensors: int) -> None:
    model = LTXTransformer(tiny.config(version, num_layers=48), variant)
    assert len(model.state_dict()) == tensors
