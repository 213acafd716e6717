"""Which layers the presets and patterns take, per version and mode (06 section 6.2)."""

from __future__ import annotations

import pytest

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.targets import PRESETS, Targets, default_preset, group_counts, linear_layers, select_layers
from tests.lora.toy import ToyTransformer

BLOCKS = 2
# preset -> layers per block in a video, av and audio run; None: refused. Second table: 2.3 with its gates.
COUNTS_20 = {
    "t2v": (8, 24, 8),
    "v2v": (10, 28, 10),
    "audio": (None, 14, 10),
    "audio_ref_only_ic": (None, 18, 10),
    "full": (10, 28, 10),
}
COUNTS_23 = {**COUNTS_20, "full": (12, 34, 12)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gates", [False, True])
def test_layers_per_block(preset, gates):
    model = ToyTransformer(BLOCKS, gates)
    for mode, count in zip(("video", "av", "audio"), (COUNTS_23 if gates else COUNTS_20)[preset]):
        targets = Targets(mode, preset)
        if count is None:
            with pytest.raises(UserError, match=f"video mode matches the preset {preset}"):
                select_layers(model, targets)
        else:
            assert len(select_layers(model, targets)) == BLOCKS * count


def test_groups_of_the_default():
    counts = group_counts(select_layers(ToyTransformer(1), Targets("av", "v2v")))
    assert counts == {
        "video attention": 8,
        "video ffn": 2,
        "audio attention": 8,
        "audio ffn": 2,
        "audio to video": 4,
        "video to audio": 4,
    }


def test_include_replaces_the_preset_and_wins_over_exclude():
    model = ToyTransformer(1)
    include = (r".*\.attn1\.to_q", r"transformer_blocks\.0\.ff\.net\.2")
    chosen = select_layers(model, Targets("av", "t2v", include, (r".*to_q",)))
    assert set(chosen) == {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"}


def test_exclude_alone_takes_layers_out_of_full():
    chosen = select_layers(ToyTransformer(1), Targets("av", "full", None, (r".*to_gate_logits",)))
    assert len(chosen) == 28


def test_patterns_match_fully_with_or_without_the_model_prefix():
    model = ToyTransformer(1)
    assert len(select_layers(model, Targets("av", include=(r"model\.transformer_blocks\.0\.attn1\.to_q",)))) == 1
    with pytest.raises(UserError, match="matches the include_patterns"):
        select_layers(model, Targets("av", include=("attn1",)))


def test_a_dot_before_ff_keeps_audio_ff_out():
    chosen = select_layers(ToyTransformer(1), Targets("av", include=(r".*\.ff\.net\.0\.proj",)))
    assert set(chosen) == {"transformer_blocks.0.ff.net.0.proj"}


def test_no_match_lists_the_layers_that_exist():
    with pytest.raises(UserError, match=r"the layers of each block are attn1.*video_to_audio_attn\.to_v"):
        select_layers(ToyTransformer(1), Targets("av", include=("nothing",)))


def test_a_pattern_that_does_not_compile_is_named():
    with pytest.raises(UserError, match=r"include_patterns: '\(' is no regular expression"):
        select_layers(ToyTransformer(1), Targets("av", include=("(",)))


def test_gates_only_by_name_or_full():
    model = ToyTransformer(1, gates=True)
    for preset in PRESETS:
        gates = [path for path in select_layers(model, Targets("av", preset)) if "gate" in path]
        assert bool(gates) == (preset == "full")
    assert len(select_layers(model, Targets("av", include=(".*to_gate_logits",)))) == 6


@pytest.mark.parametrize(
    ("mode", "strategy", "typed", "preset"),
    [
        ("av", "auto", None, "t2v"),
        ("audio", "auto", None, "audio"),
        ("audio", "audio_ref_only_ic", None, "audio"),
        ("audio", "auto", "t2v", "t2v"),
        ("video", "v2v", None, "v2v"),
        ("av", "audio_ref_only_ic", None, "audio_ref_only_ic"),
        ("av", "none", None, "t2v"),
    ],
)
def test_default_preset(mode, strategy, typed, preset):
    assert default_preset(mode, strategy, typed) == preset


def test_linear_layers_reach_outside_the_blocks():
    paths = [path for path, _ in linear_layers(ToyTransformer(1))]
    assert "patchify_proj" in paths and len(paths) == 35
