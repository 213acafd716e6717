"""Rotary tables, token positions and token layout."""

from __future__ import annotations

import torch

from ltx2_tuner.models.transformer import rope, tokens
from tests.golden.cases import Case, assert_close, golden

# Limits of the cases; the case file itself does not carry them.
LIMITS = {"video": (20, 2048, 2048), "audio": (20,), "cross": (20,), "connector": (4096,)}


@golden("common/rope")
def test_rope_tables(case: Case) -> None:
    tables = sorted({name.removesuffix(".cos") for name in case.outputs if name.endswith(".cos")})
    assert tables
    for name in tables:
        cos, sin = case.outputs[f"{name}.cos"], case.outputs[f"{name}.sin"]
        use, precision, rope_type = name.split(".")
        if rope_type == "split":
            heads, width = cos.shape[1], cos.shape[1] * cos.shape[3] * 2
        else:
            heads, width = case.settings["heads"], cos.shape[2]
        table = rope.rope_table(
            _rope_positions(case, use),
            width,
            heads,
            LIMITS[use.removeprefix("real_").split("_")[0]],
            theta=case.settings["theta"],
            double_precision=precision == "f64",
            rope_type={"split": "split", "inter": "interleaved"}[rope_type],
        )
        for actual, expected in zip(table, (cos, sin)):
            layout = actual.transpose(1, 2) if rope_type == "split" else actual.flatten(2)
            assert_close(layout, expected, 1e-5, name)


@golden("common/rope")
def test_rope_rotates_as_expected(case: Case) -> None:
    x, heads = case.inputs["x"], case.settings["heads"]
    for rope_type, name in (("split", "apply_split"), ("interleaved", "apply_inter")):
        table = rope.rope_table(
            case.inputs["video_positions"],
            x.shape[-1],
            heads,
            LIMITS["video"],
            theta=case.settings["theta"],
            rope_type=rope_type,
        )
        rotated = rope.apply_rope(x.unflatten(-1, (heads, -1)), table).flatten(2)
        assert_close(rotated, case.outputs[name], 5e-5, name)


def _rope_positions(case: Case, use: str) -> torch.Tensor:
    if use.startswith("connector"):
        return case.inputs["connector_index"]
    if use.startswith("cross_"):
        return case.inputs[f"{use.removeprefix('cross_')}_positions"][:, :1]
    return case.inputs[f"{use}_positions"]


@golden("common/positions")
def test_positions(case: Case) -> None:
    for name, expected in case.outputs.items():
        if "@" in name:
            kind, rest = name.split(".", 1)
            grid, fps = rest.split("@")
            frames, height, width = (int(size) for size in grid.split("x"))
            options = {"downscale": int(kind.removeprefix("ref"))} if kind.startswith("ref") else {}
            if kind.startswith("keyframe_"):
                options = {"start_frame": int(kind.removeprefix("keyframe_"))}
            assert_close(tokens.video_positions(frames, height, width, float(fps), **options), expected, 1e-6, name)
        elif name.startswith("audio."):
            assert_close(tokens.audio_positions(int(name.removeprefix("audio."))), expected, 1e-6, name)
    lengths = [tokens.audio_latent_length(seconds) for seconds in case.inputs["seconds"].tolist()]
    assert lengths == case.outputs["audio_frames_for_seconds"].tolist()
    frames = [tokens.video_latent_frames(count) for count in case.inputs["pixel_frames"].tolist()]
    assert frames == case.outputs["latent_frames_for_pixels"].tolist()


@golden("common/patchify")
def test_patchify(case: Case) -> None:
    video, audio = case.inputs["video"], case.inputs["audio"]
    video_tokens, audio_tokens = tokens.patchify_video(video), tokens.patchify_audio(audio)
    assert torch.equal(video_tokens, case.outputs["video_tokens"])
    assert torch.equal(audio_tokens, case.outputs["audio_tokens"])
    assert torch.equal(tokens.unpatchify_video(video_tokens, *video.shape[2:]), video)
    assert torch.equal(tokens.unpatchify_audio(audio_tokens, audio.shape[1], audio.shape[3]), audio)
