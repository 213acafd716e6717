"""Dropped captions become zeros, or the empty prompt."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.data.cache_files import read_header, write_text
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import TransformerConfig
from tests.training.tiny import train, write_workspace

PLAIN = ("--ltx2_first_frame_conditioning_p", "0", "--seed", "5")
TOKENS = 16


def blank(checkpoint) -> dict[str, torch.Tensor]:
    """Embeddings of an empty prompt, of which eight tokens are real."""
    model = TransformerConfig.from_dict(Checkpoint.open(checkpoint).config["transformer"])
    generator = torch.Generator().manual_seed(9)
    return {
        "blank_embed": torch.randn(TOKENS, model.context_width("video"), generator=generator),
        "blank_audio_embed": torch.randn(TOKENS, model.context_width("audio"), generator=generator),
        "blank_mask": (torch.arange(TOKENS) < 8).long(),
    }


def test_every_caption_dropped_is_training_on_the_empty_prompt(tmp_path, checkpoint):
    dropping = write_workspace(tmp_path / "dropping", checkpoint)
    cache = tmp_path / "blank.pt"
    torch.save({"version": 1, "audio_video": True, **blank(checkpoint)}, cache)
    source = ("--use_precached_preservation", "--preservation_prompts_cache", cache)
    dropped = ("--caption_dropout_rate", "1.0", "--caption_dropout_mode")
    found = train(dropping.arguments(*PLAIN, *dropped, "empty", *source))

    captionless = write_workspace(tmp_path / "captionless", checkpoint)
    texts = blank(checkpoint)
    for path in (captionless.root / "datasets").rglob("*_ltx2_te.safetensors"):
        metadata = read_header(path).metadata
        write_text(path, texts["blank_embed"], texts["blank_audio_embed"], texts["blank_mask"], metadata)
    expected = train(captionless.arguments(*PLAIN))
    assert found.values("loss/current") == expected.values("loss/current")
    zeros = train(write_workspace(tmp_path / "zeros", checkpoint).arguments(*PLAIN, *dropped, "zero"))
    assert found.values("loss/current") != zeros.values("loss/current")


def test_the_empty_prompt_has_to_come_from_somewhere(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint)
    with pytest.raises(UserError, match="--caption_dropout_mode empty needs --gemma_root"):
        train(space.arguments("--caption_dropout_rate", "0.5", "--caption_dropout_mode", "empty"))
