"""What the modes with references hand to the model, and that the model uses it."""

from __future__ import annotations

import copy

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.training.modes import (
    AudioReferenceAudioMode,
    AudioReferenceAVMode,
    AudioReferenceOptions,
    AVMode,
    Compute,
    ModeOptions,
    V2VMode,
)
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from tests.training.test_modes import CPU, make_batch, make_draws, model

__all__ = ["model"]  # a fixture
NONE = AudioReferenceOptions()
ALL = AudioReferenceOptions(negative_positions=True, hidden_from_video=True, hidden_from_text=True)


def audio_batch(references: list[int], sound: list[int] | None = None) -> dict:
    batch = make_batch(count=len(references), sound=sound or [6] * len(references))
    generator = torch.Generator().manual_seed(5)
    batch["ref_audio_latents"] = {"latents": torch.randn(len(references), 2, max(references), 16, generator=generator)}
    batch["ref_audio_lengths"] = torch.tensor(references, dtype=torch.int32)
    return batch


def options(settings: AudioReferenceOptions = NONE, **more) -> ModeOptions:
    return ModeOptions(audio_width=32, audio_reference=settings, **more)


def with_other_reference(batch: dict) -> dict:
    changed = {"latents": torch.randn_like(batch["ref_audio_latents"]["latents"])}
    return {**batch, "ref_audio_latents": changed}


def test_a_reference_comes_first_and_stays_clean():
    batch = make_batch()
    batch["ref_latents"] = {"latents": torch.randn(2, 8, 1, 1, 1)}
    prepared = V2VMode(ModeOptions(reference_downscale=2), CPU).prepare(batch, make_draws(first_frame_p=1.0))
    task, modality = prepared.video_task, prepared.video
    assert task.first_output == 1 and modality.latent.shape[1] == 13
    assert torch.equal(modality.latent[:, 0], batch["ref_latents"]["latents"].flatten(1))
    timesteps = task.timesteps()
    assert (timesteps[:, :5] == 0).all(), "the reference and the given first frame"
    assert torch.equal(timesteps[:, 5:], task.sigma[:, None].expand(2, 8))
    assert torch.equal(modality.sigma, task.sigma)
    assert torch.equal(modality.positions[:, 1:, 0], torch.tensor([[0.0, 64.0]] * 2).expand(2, 2, 2))
    assert modality.positions[0, 0, 0].tolist() == pytest.approx([0, 1 / 25])
    assert task.mask.shape == (2, 12) and modality.attention_mask is None


def test_a_missing_reference_names_the_item():
    with pytest.raises(UserError, match="item0 has no cached reference"):
        V2VMode(ModeOptions(), CPU).prepare(make_batch(), make_draws())
    with pytest.raises(UserError, match="item1 has no reference sound"):
        AudioReferenceAudioMode(options(), CPU).prepare(audio_batch([4, 0]), make_draws())


def test_reference_sound_follows_the_target():
    batch = audio_batch([5, 5])
    prepared = AudioReferenceAVMode(options(), CPU).prepare(batch, make_draws())
    task, modality = prepared.audio_task, prepared.audio
    reference = batch["ref_audio_latents"]["latents"].transpose(1, 2).flatten(2)
    assert torch.equal(modality.latent[:, 6:], reference)
    assert (task.timesteps()[:, 6:] == 0).all() and (task.timesteps()[:, :6] > 0).all()
    assert torch.equal(modality.sigma, task.sigma), "the level is never averaged with the clean tokens'"
    assert task.target.shape == task.mask.shape + (32,) == (2, 6, 32)
    assert torch.equal(modality.positions[:, :, 6:], modality.positions[:, :, :5]), "both start at 0"
    for name in ("attention_mask", "cross_mask", "text_keep"):
        assert getattr(modality, name) is None, "no mask where there is nothing to mask"


def test_negative_positions_end_one_step_before_zero():
    batch = audio_batch([5, 3])
    settings = AudioReferenceOptions(negative_positions=True)
    positions = AudioReferenceAVMode(options(settings), CPU).prepare(batch, make_draws()).audio.positions[:, 0, 6:]
    # 5 steps of a causal grid span 0 to 0.17 s, 3 steps 0 to 0.09 s.
    assert positions[0, 0, 0].item() == pytest.approx(-0.21) and positions[0, 4, 1].item() == pytest.approx(-0.04)
    assert positions[1, 0, 0].item() == pytest.approx(-0.13) and positions[1, 2, 1].item() == pytest.approx(-0.04)


@torch.no_grad()
def test_a_hidden_reference_does_not_reach_the_picture(model: LTXTransformer):
    """In one block whose sound tokens do not mix, the picture meets the reference in its attention to sound alone."""
    batch = audio_batch([5, 5])
    model = copy.deepcopy(model)
    model.transformer_blocks = model.transformer_blocks[:1]
    model.transformer_blocks[0].audio_attn1.to_out[0].weight.zero_()

    def change(settings: AudioReferenceOptions) -> float:
        mode = AudioReferenceAVMode(options(settings), CPU)
        one, other = (mode.prepare(given, make_draws()).run(model)[0] for given in (batch, with_other_reference(batch)))
        return (one - other).abs().max().item()

    assert change(AudioReferenceOptions(hidden_from_video=True)) == 0
    assert change(NONE) > 1e-3


@torch.no_grad()
def test_a_reference_kept_from_text_gets_exactly_nothing_of_it(model: LTXTransformer):
    model, seen = copy.deepcopy(model), []
    block = model.transformer_blocks[0]
    block.audio_ff.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mode = AudioReferenceAudioMode(options(AudioReferenceOptions(hidden_from_text=True)), CPU)
    mode.prepare(audio_batch([5, 5]), make_draws()).run(model)
    block.audio_attn2.to_out[0].weight.mul_(3)
    mode.prepare(audio_batch([5, 5]), make_draws()).run(model)
    plain, louder_text = seen
    assert torch.equal(plain[:, 6:], louder_text[:, 6:])
    assert (plain[:, :6] - louder_text[:, :6]).abs().max() > 1e-3


def test_the_reference_changes_the_target_and_not_the_count_of_losses(model: LTXTransformer):
    batch = audio_batch([5, 5])
    mode = AudioReferenceAVMode(options(ALL), CPU)
    with torch.no_grad():
        prepared = mode.prepare(batch, make_draws())
        video, audio = prepared.run(model)
        _, changed = mode.prepare(with_other_reference(batch), make_draws()).run(model)
    assert audio.shape == (2, 6, 32) and video.shape == (2, 12, 8)
    assert (audio - changed).abs().max() > 1e-3
    terms = task_loss(prepared, video, audio, LossOptions())
    error = (audio.float() - prepared.audio_task.target).square().mean(dim=(1, 2))
    torch.testing.assert_close(terms.audio.per_sample, error)


@pytest.mark.parametrize("settings", [NONE, ALL])
def test_padding_of_target_and_reference_changes_no_real_token(model: LTXTransformer, settings):
    batch = audio_batch([5, 3], sound=[6, 4])
    alone = audio_batch([5, 3], sound=[6, 4])
    alone = {
        **alone,
        "audio_latents": {"latents": alone["audio_latents"]["latents"][:, :, :4]},
        "ref_audio_latents": {"latents": alone["ref_audio_latents"]["latents"][:, :, :3]},
        "audio_lengths": torch.tensor([4, 4], dtype=torch.int32),
        "ref_audio_lengths": torch.tensor([3, 3], dtype=torch.int32),
    }
    mode = AudioReferenceAVMode(options(settings), CPU)

    class Draws:
        """The same numbers for the shared tokens of both batches."""

        caption_dropout = first_frame = staticmethod(lambda count: torch.zeros(count, dtype=torch.bool))

        def __init__(self):
            self.calls = 0

        def sigma(self, tokens, buckets=None):
            return torch.tensor([0.4, 0.6])

        def noise(self, shape):
            self.calls += 1
            full = torch.randn(2, 12 if self.calls == 1 else 6, shape[2], generator=torch.Generator().manual_seed(1))
            return full[:, : shape[1]]

    with torch.no_grad():
        video, audio = mode.prepare(batch, Draws()).run(model)
        video_alone, audio_alone = mode.prepare(alone, Draws()).run(model)
    torch.testing.assert_close(audio[1, :4], audio_alone[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(video[1], video_alone[1], rtol=0, atol=1e-5)


def test_an_item_without_sound_is_predicted_as_if_alone(model: LTXTransformer):
    batch = audio_batch([5, 5], sound=[6, 0])
    mode = AudioReferenceAVMode(options(ALL), CPU)
    silent = {key: value for key, value in batch.items() if not key.startswith(("audio_", "ref_"))}
    with torch.no_grad():
        video, _ = mode.prepare(batch, make_draws()).run(model)
        alone, _ = AVMode(options(), CPU).prepare(silent, make_draws()).run(model)
    torch.testing.assert_close(video[1], alone[1], rtol=0, atol=1e-5)


def test_positions_stay_exact_in_low_precision():
    mode = AudioReferenceAVMode(options(ALL), Compute(torch.device("cpu"), torch.bfloat16))
    modality = mode.prepare(audio_batch([5, 5]), make_draws()).audio
    assert modality.positions.dtype == torch.float32 and modality.latent.dtype == torch.bfloat16
