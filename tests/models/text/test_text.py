"""Normalisation, registers and configuration of the text side (parity of whole passes is in tests/golden)."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.models.text import TextConfig, TextConnectors
from ltx2_tuner.models.text.connector import fill_with_registers, rotary_table, rotate
from ltx2_tuner.models.text.features import normalize_per_prompt, normalize_per_token

SEPARATE = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}
SMALL = {
    "caption_channels": 12,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 8,
    "connector_num_layers": 1,
    "connector_num_learnable_registers": 4,
    "connector_positional_embedding_max_pos": [4096],
}


def test_prompt_is_normalised_by_its_own_mean_and_range():
    state = torch.tensor([[[100.0, 100.0], [1.0, 3.0], [5.0, 7.0]]])
    result = normalize_per_prompt(state, torch.tensor([[False, True, True]]))
    expected = torch.tensor([[[0, 0], [-4, -4 / 3], [4 / 3, 4]]])
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_token_is_normalised_by_its_rms():
    state = torch.tensor([[[3.0, 4.0], [7.0, 7.0]]])
    result = normalize_per_token(state, torch.tensor([[True, False]]))
    torch.testing.assert_close(result, torch.tensor([[[0.848528, 1.131371], [0, 0]]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [normalize_per_prompt, normalize_per_token])
def test_nan_on_padding_does_not_leak(normalize):
    state = torch.randn(1, 3, 4)
    mask = torch.tensor([[False, True, True]])
    clean = normalize(state, mask)
    state[0, 0] = torch.nan
    assert torch.equal(normalize(state, mask), clean)


@pytest.mark.parametrize("side", ["left", "right"])
def test_registers_follow_the_valid_rows(side):
    registers = torch.arange(4.0)[:, None].expand(4, 3) + 100
    valid = torch.arange(9.0).reshape(3, 3)
    features = torch.full((1, 8, 3), -1.0)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    rows = slice(5, 8) if side == "left" else slice(0, 3)
    features[0, rows], mask[0, rows] = valid, True
    out = fill_with_registers(features, mask, registers)[0]
    assert torch.equal(out[:3], valid)
    for position in range(3, 8):
        assert torch.equal(out[position], registers[position % 4])


def test_length_must_fit_the_registers():
    with pytest.raises(ValueError, match="no multiple of the 4 registers"):
        fill_with_registers(torch.zeros(1, 6, 2), torch.ones(1, 6, dtype=torch.bool), torch.zeros(4, 2))


@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_rotation_keeps_lengths_and_depends_on_distance(layout):
    config = TextConfig.from_dict(SMALL).video
    table = rotary_table(config, 8, torch.device("cpu"), torch.float32)
    query, key = torch.randn(2, 1, 2, 1, 8).expand(2, 1, 2, 8, 8)
    query, key = rotate(query, table, layout), rotate(key, table, layout)
    scores = query @ key.transpose(-1, -2)
    torch.testing.assert_close(query.norm(dim=-1), query.norm(dim=-1)[..., :1].expand(1, 2, 8))
    torch.testing.assert_close(scores[..., 0, 3], scores[..., 2, 5], atol=1e-4, rtol=1e-4)


def test_left_padding_can_be_left_out():
    torch.manual_seed(0)
    config = TextConfig.from_dict({**SMALL, **SEPARATE})
    model = TextConnectors(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    states = [torch.randn(1, 8, 12) for _ in range(config.states)]
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        whole = model(states, mask)
        cut = model([state[:, 4:] for state in states], mask[:, 4:], tokens=8)
    torch.testing.assert_close(cut.video, whole.video)
    torch.testing.assert_close(cut.audio, whole.audio)
    assert whole.mask.tolist() == [[1] * 8] == cut.mask.tolist()


def test_video_mode_has_no_audio_parts():
    with torch.device("meta"):
        model = TextConnectors(TextConfig.from_dict({**SMALL, **SEPARATE}), audio=False)
    assert not [name for name, _ in model.named_parameters() if "audio" in name]


def test_released_sizes_are_the_defaults():
    old = TextConfig.from_dict({})
    assert (old.hidden, old.states, old.separate_projections) == (3840, 49, False)
    assert (old.video.width, old.audio.width, old.video.layers, old.video.gated) == (3840, 3840, 2, False)
    new = TextConfig.from_dict(SEPARATE)
    assert (new.video.width, new.audio.width, new.audio.layers, new.audio.gated) == (4096, 2048, 8, True)
    assert new.video.max_position == 4096


def test_shapes_describe_a_file_without_config():
    shapes = {
        "text_embedding_projection.video_aggregate_embed.weight": (64, 3840 * 3),
        "video_embeddings_connector.learnable_registers": (16, 64),
        "video_embeddings_connector.transformer_1d_blocks.2.attn1.to_q.weight": (64, 64),
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_gate_logits.weight": (4, 64),
    }
    config = TextConfig.from_dict({}, shapes)
    assert (config.separate_projections, config.states) == (True, 3)
    assert (config.video.heads, config.video.head_dim, config.video.layers) == (4, 16, 3)
    assert (config.video.registers, config.video.gated) == (16, True)


@pytest.mark.parametrize("change", [{"caption_proj_input_norm": True}, {"caption_proj_before_connector": None}])
def test_unknown_text_path_is_refused(change):
    keys = {key: value for key, value in {**SEPARATE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=next(iter(change))):
        TextConfig.from_dict(keys)


def test_repacked_file_with_two_keys_is_read_by_its_tensors():
    keys = {"caption_projection_first_linear": False, "caption_projection_second_linear": False}
    shapes = {"text_embedding_projection.video_aggregate_embed.weight": (4096, 188160)}
    assert TextConfig.from_dict(keys, shapes).separate_projections
    with pytest.raises(ValueError, match="caption_proj_before_connector = absent"):
        TextConfig.from_dict(keys, {**shapes, "caption_projection.linear_1.weight": (1, 1)})


def test_width_that_contradicts_the_config_is_refused():
    shapes = {"video_embeddings_connector.learnable_registers": (4, 24)}
    with pytest.raises(ValueError, match="24 wide, but connector_num_attention_heads"):
        TextConfig.from_dict(SMALL, shapes)
