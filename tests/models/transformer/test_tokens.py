from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltx2_tuner.models.transformer import tokens

SIZE = st.integers(1, 4)


@settings(max_examples=25, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, SIZE)
def test_video_latents_survive_the_way_to_tokens_and_back(
    batch: int, channels: int, frames: int, height: int, width: int
) -> None:
    latents = torch.randn(batch, channels, frames, height, width)
    sequence = tokens.patchify_video(latents)
    assert sequence.shape == (batch, frames * height * width, channels)
    assert torch.equal(tokens.unpatchify_video(sequence, frames, height, width), latents)


@settings(max_examples=25, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE)
def test_audio_latents_survive_the_way_to_tokens_and_back(batch: int, channels: int, length: int, bins: int) -> None:
    latents = torch.randn(batch, channels, length, bins)
    sequence = tokens.patchify_audio(latents)
    assert sequence.shape == (batch, length, channels * bins)
    assert torch.equal(tokens.unpatchify_audio(sequence, channels, bins), latents)


def test_every_sample_has_its_own_frame_rate() -> None:
    both = tokens.video_positions(2, 1, 1, torch.tensor([25.0, 50.0]), batch=2)
    assert torch.allclose(both[0, 0], torch.tensor([[0.0, 0.04], [0.04, 0.36]]))
    assert torch.equal(both[1], tokens.video_positions(2, 1, 1, 50.0)[0])


def test_later_groups_of_several_frames_have_no_short_first_frame() -> None:
    times = tokens.video_positions(2, 1, 1, 1.0, start_frame=16)[0, 0]
    assert times.tolist() == [[16, 24], [24, 32]]


def test_a_window_shift_replaces_the_index() -> None:
    assert torch.equal(tokens.audio_positions(3, shift=2), tokens.audio_positions(5)[:, :, 2:])


def test_positions_stay_float32() -> None:
    assert tokens.video_positions(1, 1, 1, 24).dtype == torch.float32
    assert tokens.audio_positions(1).dtype == torch.float32
