"""Gemma's hidden states -> features -> context, against the official package."""

from __future__ import annotations

from pathlib import Path

import torch

from ltx2_tuner.models.text import TextConfig, TextConnectors
from tests.golden.cases import Case, assert_close, golden, read_config, read_weights

TOLERANCE = 5e-5


def load(path: Path) -> TextConnectors:
    """The text side of a checkpoint; sizes come from its config and its tensors."""
    weights = {name.removeprefix("model.diffusion_model."): value for name, value in read_weights(path, "").items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    with torch.device("meta"):
        model = TextConnectors(TextConfig.from_dict(read_config(path)["transformer"], shapes))
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    return model.eval()


@golden("text_*/*")
@torch.no_grad()
def test_text_side(case: Case) -> None:
    model = load(case.checkpoint)
    states, mask = case.inputs["hidden_states"].unbind(1), case.inputs["mask"]
    video, audio = model.text_embedding_projection(states, mask.bool())
    context = model(states, mask)
    found = {
        "video_features": video,
        "audio_features": audio,
        "video_encoding": context.video,
        "audio_encoding": context.audio,
        "mask": context.mask,
    }
    for name, expected in case.outputs.items():
        assert_close(found[name], expected, TOLERANCE, name)
