from __future__ import annotations

import dataclasses

import pytest
import torch

from ltx2_tuner.models.transformer import LTXTransformer, Modality, Perturbations, SamplePerturbations
from tests.golden.cases import DATA, read_config, read_weights
from tests.models.transformer import tiny

VERSIONS = ("2.0", "2.3", "2.5")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def small_variant(model: LTXTransformer, variant: str) -> LTXTransformer:
    small = LTXTransformer(model.config, variant)
    weights = model.state_dict()
    small.load_state_dict({name: weights[name] for name in small.state_dict()})
    return small


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", ["video", "audio"])
def test_a_small_variant_is_the_full_model_without_the_other_stream(version: str, variant: str) -> None:
    model = tiny.model(version)
    streams = {"video": None, "audio": None, variant: tiny.inputs(model.config)[variant]}
    expected, actual = model(**streams), small_variant(model, variant)(**streams)
    position = ("video", "audio").index(variant)
    assert expected[1 - position] is None and actual[1 - position] is None
    close(actual[position], expected[position])


@pytest.mark.parametrize("version", ["20", "23"])
@pytest.mark.parametrize("variant", ["av", "video", "audio"])
def test_the_keys_of_a_variant_are_those_of_the_checkpoint(version: str, variant: str) -> None:
    path = DATA / f"tiny_ltx2_{version}.safetensors"
    settings = tiny.TransformerConfig.from_dict(read_config(path)["transformer"])
    keys = {key for key in read_weights(path, "model.diffusion_model.") if "_embeddings_connector." not in key}
    cross = ("av_ca_", "audio_to_video_attn", "video_to_audio_attn", "scale_shift_table_a2v_")
    if variant != "av":
        keys = {key for key in keys if not any(part in key for part in cross)}
        keys = {
            key for key in keys if any(part.startswith("audio_") for part in key.split(".")) == (variant == "audio")
        }
    with torch.device("meta"):
        assert set(LTXTransformer(settings, variant).state_dict()) == keys


def test_a_stream_the_variant_lacks_is_refused() -> None:
    model = tiny.model(variant="video")
    streams = tiny.inputs(model.config)
    with pytest.raises(ValueError, match="no audio stream"):
        model(**streams)
    with pytest.raises(ValueError, match="neither video nor audio"):
        model(None, None)


def test_a_disabled_stream_stays_as_embedded_and_is_still_attended_to() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    states = {}
    model.block_outputs = lambda index, video, audio: states.__setitem__(index, audio)
    disabled = dataclasses.replace(streams["audio"], enabled=False)
    video, audio = model(streams["video"], disabled)
    embedded = model.audio_patchify_proj(disabled.latent)
    assert all(torch.equal(state, embedded) for state in states.values())
    assert audio.shape == disabled.latent.shape
    louder = dataclasses.replace(disabled, latent=disabled.latent + 1)
    assert (model(streams["video"], louder)[0] - video).abs().max() > 1e-3
    assert (model(streams["video"], None)[0] - video).abs().max() > 1e-3


def test_a_stream_without_tokens_is_like_an_absent_one() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    empty = dataclasses.replace(
        streams["audio"],
        latent=streams["audio"].latent[:, :0],
        timesteps=streams["audio"].timesteps[:, :0],
        positions=streams["audio"].positions[:, :, :0],
    )
    video, audio = model(streams["video"], empty)
    assert audio.shape == empty.latent.shape
    assert torch.equal(video, model(streams["video"], None)[0])


def test_both_directions_read_the_streams_as_they_were_before_the_exchange() -> None:
    model = tiny.model(num_layers=1)
    streams = tiny.inputs(model.config)
    both = model(**streams)
    only_a2v = model(**streams, perturbations=Perturbations.uniform(2, skip_v2a="all"))
    only_v2a = model(**streams, perturbations=Perturbations.uniform(2, skip_a2v="all"))
    close(only_a2v[0], both[0])
    close(only_v2a[1], both[1])


@pytest.mark.parametrize("kind", ["skip_video_self", "skip_audio_self", "skip_a2v", "skip_v2a"])
def test_a_mixed_batch_perturbs_each_sample_as_if_it_were_alone(kind: str) -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    mixed = Perturbations((SamplePerturbations(**{kind: frozenset({1})}), SamplePerturbations()))
    actual = model(**streams, perturbations=mixed)
    all_skipped = model(**streams, perturbations=Perturbations.uniform(2, **{kind: (1,)}))
    plain = model(**streams)
    for stream in range(2):
        close(actual[stream][:1], all_skipped[stream][:1])
        close(actual[stream][1:], plain[stream][1:])
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(all_skipped, plain))


def test_a_sample_whose_audio_may_not_be_attended_to_is_like_one_without_audio() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    valid = torch.tensor([[False] * tiny.AUDIO_TOKENS, [True] * tiny.AUDIO_TOKENS])
    video, _ = model(streams["video"], dataclasses.replace(streams["audio"], cross_mask=valid))
    close(video[:1], model(tiny.one_sample(streams["video"], 0), None)[0])
    close(video[1:], model(**streams)[0][1:])


def test_padded_audio_tokens_change_nothing() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    length = tiny.AUDIO_TOKENS - 2
    valid = (torch.arange(tiny.AUDIO_TOKENS) < length).expand(2, -1)
    padded = dataclasses.replace(streams["audio"], cross_mask=valid, attention_mask=valid[:, None].float())
    short = dataclasses.replace(
        streams["audio"],
        latent=streams["audio"].latent[:, :length],
        timesteps=streams["audio"].timesteps[:, :length],
        positions=streams["audio"].positions[:, :, :length],
    )
    actual, expected = model(streams["video"], padded), model(streams["video"], short)
    close(actual[0], expected[0])
    close(actual[1][:, :length], expected[1])


def test_tokens_kept_from_the_text_do_not_depend_on_it() -> None:
    model = tiny.model(variant="audio", num_layers=1)
    audio = tiny.inputs(model.config)["audio"]
    keep = torch.ones(2, tiny.AUDIO_TOKENS)
    keep[:, -1] = 0
    audio = dataclasses.replace(audio, text_keep=keep)
    other = dataclasses.replace(audio, context=torch.randn_like(audio.context))
    difference = (model(None, audio)[1] - model(None, other)[1]).abs().amax(dim=(0, 2))
    assert difference[-1] == 0
    assert (difference[:-1] > 1e-3).all()


def test_text_masks_hide_text_tokens() -> None:
    model = tiny.model()
    video = tiny.inputs(model.config)["video"]
    mask = torch.ones(2, tiny.TEXT_TOKENS, dtype=torch.int64)
    mask[:, -2:] = 0
    shorter = model(dataclasses.replace(video, context=video.context[:, :-2]), None)[0]
    bias = (1.0 - mask) * -1e30
    per_query = mask[:, None].expand(-1, video.latent.shape[1], -1)
    for form in (mask, mask.bool(), bias, per_query):
        close(model(dataclasses.replace(video, context_mask=form), None)[0], shorter)
    nothing = torch.zeros_like(mask)
    assert model(dataclasses.replace(video, context_mask=nothing), None)[0].isfinite().all()


def test_positions_may_be_shared_by_the_batch() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    shared = {
        name: dataclasses.replace(modality, positions=modality.positions[:1]) for name, modality in streams.items()
    }
    for actual, expected in zip(model(**shared), model(**streams)):
        close(actual, expected)


def test_interleaved_rotation_depends_on_relative_positions_alone() -> None:
    model = tiny.model(rope_type="interleaved", num_layers=1, variant="audio")
    audio = tiny.inputs(model.config)["audio"]
    later = dataclasses.replace(audio, positions=audio.positions + 0.5)
    elsewhere = dataclasses.replace(audio, positions=audio.positions * 2)
    expected = model(None, audio)[1]
    torch.testing.assert_close(model(None, later)[1], expected, atol=5e-3, rtol=0)
    assert (model(None, elsewhere)[1] - expected).abs().max() > 1e-2


def test_noise_levels_are_not_rounded_to_the_latents_dtype() -> None:
    model = tiny.model().bfloat16()
    video = tiny.inputs(model.config, per_token=False)["video"]
    near = [dataclasses.replace(video, timesteps=torch.full((2, 1), level)) for level in (0.5, 0.501)]
    assert torch.tensor(0.501).bfloat16() == 0.5, "bfloat16 cannot tell the two levels apart"
    assert not torch.equal(model(near[0], None)[0], model(near[1], None)[0])


def test_a_marked_keyframe_gets_the_embedding_of_2_5() -> None:
    model = tiny.model("2.5", num_layers=1)
    video = tiny.inputs(model.config)["video"]
    marker = torch.zeros(video.latent.shape[:2])
    marker[:, 0] = 1
    model_without = tiny.model("2.5", num_layers=1)
    model_without.keyframes_abs_pos_embedding.zero_()
    marked = dataclasses.replace(video, keyframe_marker=marker)
    assert torch.equal(model_without(marked, None)[0], model_without(video, None)[0])
    assert not torch.equal(model(marked, None)[0], model(video, None)[0])


def test_half_precision_latents_meet_float32_positions() -> None:
    model = tiny.model().bfloat16()
    streams = {
        name: dataclasses.replace(modality, latent=modality.latent.bfloat16(), context=modality.context.bfloat16())
        for name, modality in tiny.inputs(model.config).items()
    }
    exact = tiny.model()
    for actual, expected in zip(model(**streams), exact(**streams)):
        assert actual.dtype == torch.bfloat16
        error = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 5e-2


def test_the_block_runner_and_the_observer_see_every_block() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    expected = model(**streams)
    run, seen = [], []

    def runner(block: torch.nn.Module, index: int, *arguments: object) -> tuple:
        assert block is model.transformer_blocks[index]
        run.append(index)
        return block(*arguments)

    model.block_runner = runner
    model.block_outputs = lambda index, video, audio: seen.append((index, video.shape, audio.shape))
    assert all(torch.equal(*pair) for pair in zip(model(**streams), expected))
    assert run == [0, 1]
    widths = (model.config.video_width, model.config.audio_width)
    assert [(index, video[2], audio[2]) for index, video, audio in seen] == [(0, *widths), (1, *widths)]


def test_only_one_sample_of_a_batch_is_reached_by_a_change_to_it() -> None:
    model = tiny.model()
    streams: dict[str, Modality] = tiny.inputs(model.config)
    batch = model(**streams)
    for sample in range(2):
        alone = model(*(tiny.one_sample(modality, sample) for modality in streams.values()))
        for whole, part in zip(batch, alone):
            close(whole[sample : sample + 1], part)
