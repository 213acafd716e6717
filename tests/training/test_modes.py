"""What the modes hand to the model."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.training.draws import TrainingDraws, ValidationDraws
from ltx2_tuner.training.modes import AudioMode, AVMode, Compute, ModeOptions, V2VMode, VideoMode
from ltx2_tuner.training.modes.streams import Text
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from ltx2_tuner.training.random import DrawKey
from ltx2_tuner.training.sigmas import SigmaSampler

CPU = Compute(torch.device("cpu"), torch.float32)
OPTIONS = ModeOptions(audio_width=32)


def make_draws(index: int = 0, **options) -> TrainingDraws:
    return TrainingDraws(DrawKey(3, 0, index), SigmaSampler(), **options)


def make_batch(count: int = 2, sound: list[int] | None = None, frames: int = 3, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch = {
        "latents": {
            "latents": values(count, 8, frames, 2, 2),
            "num_frames": torch.full((count,), 5, dtype=torch.int32),
            "height": torch.full((count,), 2, dtype=torch.int32),
            "width": torch.full((count,), 2, dtype=torch.int32),
            "fps": torch.full((count,), 25.0),
        },
        "conditions": {
            "video_prompt_embeds": values(count, 16, 64),
            "audio_prompt_embeds": values(count, 16, 32),
            "prompt_attention_mask": torch.ones(count, 16, dtype=torch.int64),
        },
        "item_keys": [f"item{index}" for index in range(count)],
    }
    if sound is not None:
        batch["audio_latents"] = {"latents": values(count, 2, max(sound), 16)}
        batch["audio_lengths"] = torch.tensor(sound, dtype=torch.int32)
    return batch


@pytest.fixture(scope="module")
def model() -> LTXTransformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        num_heads=4,
        head_dim=16,
        audio_head_dim=8,
        in_channels=8,
        out_channels=8,
        audio_in_channels=32,
        audio_out_channels=32,
        cross_attention_dim=64,
        audio_cross_attention_dim=32,
        cross_attention_adaln=True,
        apply_gated_attention=True,
        caption_proj_before_connector=True,
    )
    model = LTXTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_sigma_and_positions_stay_exact_in_low_precision():
    mode = AVMode(OPTIONS, Compute(torch.device("cpu"), torch.bfloat16))
    prepared = mode.prepare(make_batch(sound=[5, 5]), make_draws(first_frame_p=1.0))
    sigma = make_draws(first_frame_p=1.0).sigma(torch.tensor([12, 12]))
    for modality in (prepared.video, prepared.audio):
        assert torch.equal(modality.sigma, sigma)
        assert modality.positions.dtype == torch.float32
        assert modality.latent.dtype == torch.bfloat16
    assert prepared.video_task.target.dtype == torch.float32


def test_a_conditioned_first_frame_is_clean_and_not_counted():
    batch = make_batch()
    prepared = VideoMode(OPTIONS, CPU).prepare(batch, make_draws(first_frame_p=1.0))
    task = prepared.video_task
    clean = batch["latents"]["latents"].flatten(2).transpose(1, 2)
    assert torch.equal(task.latent[:, :4], clean[:, :4])
    assert not torch.equal(task.latent[:, 4:], clean[:, 4:])
    assert not task.mask[:, :4].any() and task.mask[:, 4:].all()
    timesteps = task.timesteps()
    assert (timesteps[:, :4] == 0).all() and torch.equal(timesteps[:, 4], task.sigma)
    gathered = prepared.video.timesteps.gather(1, prepared.video.timestep_index)
    assert torch.equal(gathered, timesteps)


def test_single_frames_are_never_conditioned():
    prepared = VideoMode(OPTIONS, CPU).prepare(make_batch(frames=1), make_draws(first_frame_p=1.0))
    assert prepared.video_task.mask.all()
    assert prepared.video.timestep_index is None


def test_first_frames_are_conditioned_as_often_as_asked():
    draws = [make_draws(index, first_frame_p=0.3).first_frame(4) for index in range(500)]
    assert torch.cat(draws).float().mean().item() == pytest.approx(0.3, abs=0.03)


@torch.no_grad()
def test_batches_with_and_without_clean_frames_are_alike_in_form(model):
    """A compiled or recorded pass then serves both; and the form changes no result."""
    mode, forms = VideoMode(OPTIONS, CPU), set()
    for index in range(20):
        prepared = mode.prepare(make_batch(), make_draws(index, first_frame_p=0.2))
        forms.add((bool(prepared.video_task.clean.any()), prepared.video.timesteps.shape))
        if not prepared.video_task.clean.any():
            plain = mode.prepare(make_batch(), make_draws(index))
            assert plain.video.timestep_index is None
            assert torch.equal(prepared.video.latent, plain.video.latent)
            torch.testing.assert_close(prepared.run(model)[0], plain.run(model)[0], rtol=1e-5, atol=1e-5)
    assert forms == {(True, (2, 2)), (False, (2, 2))}


def test_conditioning_does_not_shift_other_draws():
    plain = VideoMode(OPTIONS, CPU).prepare(make_batch(), make_draws())
    changed = VideoMode(OPTIONS, CPU).prepare(make_batch(), make_draws(first_frame_p=0.5, caption_dropout_rate=0.5))
    assert torch.equal(plain.video_task.sigma, changed.video_task.sigma)
    assert torch.equal(plain.video_task.target, changed.video_task.target)


def test_a_dropped_caption_is_zeros_with_one_valid_position():
    batch = make_batch(sound=[5, 5])
    prepared = AVMode(OPTIONS, CPU).prepare(batch, make_draws(caption_dropout_rate=1.0))
    assert not prepared.video.context.any() and not prepared.audio.context.any()
    assert prepared.video.context_mask.tolist() == [[1] + [0] * 15] * 2
    assert batch["conditions"]["video_prompt_embeds"].any(), "the batch itself is left alone"


def test_a_dropped_caption_can_become_the_blank_prompt():
    blank = Text(torch.full((16, 64), 2.0), torch.full((16, 32), 3.0), torch.ones(16, dtype=torch.int64))
    mode = AVMode(OPTIONS, Compute(torch.device("cpu"), torch.float32, blank))
    prepared = mode.prepare(make_batch(sound=[5, 5]), make_draws(caption_dropout_rate=1.0))
    assert (prepared.video.context == 2).all() and (prepared.audio.context == 3).all()
    assert prepared.video.context_mask is None


def test_a_full_text_mask_is_left_out():
    assert VideoMode(OPTIONS, CPU).prepare(make_batch(), make_draws()).video.context_mask is None


def test_a_silent_item_in_a_mixed_batch_is_predicted_as_if_alone(model):
    batch = make_batch(sound=[6, 0])
    with torch.no_grad():
        video, _ = AVMode(OPTIONS, CPU).prepare(batch, make_draws()).run(model)
        alone, _ = VideoMode(OPTIONS, CPU).prepare(batch, make_draws()).run(model)
    torch.testing.assert_close(video[1], alone[1], rtol=0, atol=1e-5)
    assert (video[0] - alone[0]).abs().max() > 1e-3


def test_padding_changes_no_real_token(model):
    batch = make_batch(sound=[6, 4])
    changed = {**batch, "audio_latents": {"latents": batch["audio_latents"]["latents"].clone()}}
    changed["audio_latents"]["latents"][1, :, 4:] = 50.0
    with torch.no_grad():
        prepared = AVMode(OPTIONS, CPU).prepare(batch, make_draws())
        video, audio = prepared.run(model)
        other_video, other_audio = AVMode(OPTIONS, CPU).prepare(changed, make_draws()).run(model)
    torch.testing.assert_close(video, other_video, rtol=0, atol=1e-6)
    torch.testing.assert_close(audio[1, :4], other_audio[1, :4], rtol=0, atol=1e-6)
    assert prepared.audio_task.mask.sum(dim=1).tolist() == [6, 4]


def test_a_batch_without_sound_runs_the_picture_alone():
    for sound in (None, [0, 0]):
        batch = make_batch() if sound is None else make_batch(sound=[1, 1])
        if sound is not None:
            batch["audio_lengths"] = torch.tensor(sound)
        prepared = AVMode(OPTIONS, CPU).prepare(batch, make_draws())
        assert prepared.audio is None and not prepared.has_audio


def test_silence_is_trained_where_there_is_no_sound():
    options = ModeOptions(audio_width=32, silence_regularizer=True, silence_weight=0.25)
    silence = torch.arange(4.0)[:, None].expand(4, 32)
    prepared = AVMode(options, CPU, silence).prepare(make_batch(), make_draws())
    task = prepared.audio_task
    steps = int(17 / 25 / 0.04)
    assert task.latent.shape == (2, steps, 32) and task.mask.all()
    clean = task.latent - task.sigma[:, None, None] * task.target
    torch.testing.assert_close(clean[0, :, 0], torch.arange(steps) % 4.0, rtol=0, atol=1e-5)
    assert prepared.audio_weight == 0.25 and not prepared.has_audio


def test_silence_in_a_mixed_batch_is_weighted_by_itself():
    options = ModeOptions(audio_width=32, silence_regularizer=True, silence_weight=0.25)
    prepared = AVMode(options, CPU).prepare(make_batch(sound=[6, 0]), make_draws())
    assert prepared.audio_task.sample_weights.tolist() == [1.0, 0.25]
    assert prepared.audio_weight == 1.0 and prepared.has_audio
    assert prepared.audio_task.mask.sum(dim=1).tolist() == [6, 17]


def test_sound_can_draw_its_own_noise_level():
    shared = AVMode(OPTIONS, CPU).prepare(make_batch(sound=[6, 6]), make_draws())
    assert torch.equal(shared.video.sigma, shared.audio.sigma)
    options = ModeOptions(audio_width=32, independent_audio=True)
    own = AVMode(options, CPU).prepare(make_batch(sound=[6, 6]), make_draws())
    assert torch.equal(own.video.sigma, shared.video.sigma)
    assert not torch.equal(own.video.sigma, own.audio.sigma)


@pytest.mark.parametrize(("resolution", "tokens"), [(64, 5 * 4), (128, 5 * 16), (0, 5 * 2 * 2)])
def test_audio_mode_takes_its_shift_from_the_virtual_picture(resolution, tokens):
    mode = AudioMode(ModeOptions(audio_width=32, sequence_resolution=resolution), CPU)
    prepared = mode.prepare(make_batch(sound=[6, 6]), make_draws())
    assert torch.equal(prepared.audio.sigma, make_draws().sigma(torch.full((2,), tokens)))
    assert prepared.video is None


def test_audio_mode_without_virtual_geometry_says_what_to_do():
    batch = make_batch(sound=[6, 6])
    for name in ("num_frames", "height", "width"):
        batch["latents"][name] = torch.ones(2, dtype=torch.int32)
    with pytest.raises(UserError, match=r"item0: .*ltx2_cache_latents.py --ltx2_mode audio"):
        AudioMode(ModeOptions(audio_width=32, sequence_resolution=0), CPU).prepare(batch, make_draws())


def test_missing_sound_text_names_the_command():
    batch = make_batch(sound=[6, 6])
    del batch["conditions"]["audio_prompt_embeds"]
    with pytest.raises(UserError, match=r"ltx2_cache_text_encoder_outputs.py --ltx2_mode av"):
        AVMode(OPTIONS, CPU).prepare(batch, make_draws())


def test_a_dataset_weight_wins():
    batch = {**make_batch(sound=[6, 6]), "audio_loss_weight": 0.5}
    prepared = AVMode(ModeOptions(audio_width=32, audio_weight=2.0, video_weight=3.0), CPU).prepare(batch, make_draws())
    assert (prepared.video_weight, prepared.audio_weight) == (3.0, 0.5)


def test_the_total_is_the_weighted_sum(model):
    mode = AVMode(ModeOptions(audio_width=32, audio_weight=2.0, video_weight=3.0), CPU)
    prepared = mode.prepare(make_batch(sound=[6, 0]), make_draws())
    with torch.no_grad():
        terms = task_loss(prepared, *prepared.run(model), LossOptions())
    assert terms.total.item() == pytest.approx(3 * terms.video.mean.item() + 2 * terms.audio.mean.item())
    assert terms.audio.mean.item() == pytest.approx(terms.audio.per_sample[0].item())


def test_a_reference_of_another_size_is_refused():
    batch = make_batch()
    batch["ref_latents"] = {"latents": torch.randn(2, 8, 3, 2, 2)}
    options = ModeOptions(reference_downscale=2)
    with pytest.raises(UserError, match="--reference_downscale is 2"):
        V2VMode(options, CPU).prepare(batch, make_draws())


def test_validation_items_keep_their_noise():
    def draw(key: str, seed: int):
        draws = ValidationDraws(key, seed, SigmaSampler())
        return draws.sigma(torch.tensor([12])).item(), draws.noise((1, 3)).tolist()

    assert draw("a", 1) == draw("a", 1)
    assert draw("a", 1) != draw("b", 1)
    assert draw("a", 1) != draw("a", 2)
