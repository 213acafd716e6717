"""Blank preservation, DOP, prior divergence and audio DOP, against the same passes written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltx2_tuner.training.modes import AudioMode, AVMode, ModeOptions, V2VMode, VideoMode
from ltx2_tuner.training.regularizers.audio_dop import AudioDop, silent_mode
from ltx2_tuner.training.regularizers.passes import switched_off
from ltx2_tuner.training.regularizers.preservation import PriorDivergence, PromptPreservation, with_prompt
from tests.training.regularizers.setting import Bench, count_calls, halves, make_prompt
from tests.training.test_modes import CPU, OPTIONS, make_batch, make_draws


def expected_difference(bench: Bench, prepared, stream: int) -> float:
    """Mean squared difference of network on and off over the counted tokens of a stream, sample by sample."""
    with torch.no_grad():
        on = prepared.run(bench.model)[stream]
        with switched_off(bench.network):
            off = prepared.run(bench.model)[stream]
    task = (prepared.video_task, prepared.audio_task)[stream]
    samples = []
    for index in range(len(on)):
        tokens = [(on[index, t] - off[index, t]).square().mean() for t in range(on.shape[1]) if task.mask[index, t]]
        samples.append(sum(tokens) / len(tokens))
    return float(sum(samples) / len(samples))


@pytest.mark.parametrize("sound", [None, [6, 4]])
def test_prompt_preservation_is_the_difference_of_two_passes(sound):
    """Conditioned first frames and padded sound do not count; both streams add up."""
    bench = Bench(AVMode(OPTIONS, CPU))
    member = PromptPreservation("loss/dop", bench.passes, make_prompt(), 0.7)
    batch, draws = make_batch(sound=sound), make_draws(first_frame_p=1.0)
    prepared = bench.mode.prepare(batch, draws)
    work = bench.regularizers(member).start(prepared, batch, draws, 0)
    with_text = with_prompt(prepared, make_prompt())
    assert (
        with_text.video.context.shape == (2, 16, 64) and with_text.video.context_mask[0].tolist() == [1] * 13 + [0] * 3
    )
    expected = expected_difference(bench, with_text, 0)
    if sound is not None:
        expected += expected_difference(bench, with_text, 1)
    assert float(member.separate_loss(work).detach()) == pytest.approx(0.7 * expected, rel=1e-4)
    assert expected > 1e-4


def test_a_prompt_without_sound_acts_on_the_picture_alone():
    bench = Bench(AVMode(OPTIONS, CPU))
    batch, draws = make_batch(sound=[6, 6]), make_draws()
    prepared = bench.mode.prepare(batch, draws)
    member = PromptPreservation("loss/dop", bench.passes, make_prompt(sound=False), 1.0)
    work = bench.regularizers(member).start(prepared, batch, draws, 0)
    alone = dataclasses.replace(with_prompt(prepared, make_prompt()), audio=None)
    assert float(member.separate_loss(work).detach()) == pytest.approx(expected_difference(bench, alone, 0), rel=1e-4)


def test_audio_mode_preserves_sound():
    bench = Bench(AudioMode(OPTIONS, CPU))
    batch, draws = make_batch(sound=[6, 4]), make_draws()
    prepared = bench.mode.prepare(batch, draws)
    member = PromptPreservation("loss/dop", bench.passes, make_prompt(), 1.0)
    expected = expected_difference(bench, with_prompt(prepared, make_prompt()), 1)
    work = bench.regularizers(member).start(prepared, batch, draws, 0)
    assert float(member.separate_loss(work).detach()) == pytest.approx(expected, rel=1e-4)


def test_references_take_part_and_are_not_counted():
    bench = Bench(V2VMode(ModeOptions(reference_downscale=2), CPU))
    batch, draws = make_batch(), make_draws()
    batch["ref_latents"] = {"latents": torch.randn(2, 8, 1, 1, 1)}
    prepared = bench.mode.prepare(batch, draws)
    member = PromptPreservation("loss/blank_pres", bench.passes, make_prompt(), 1.0)
    work = bench.regularizers(member).start(prepared, batch, draws, 0)
    loss = float(member.separate_loss(work).detach())
    assert loss == pytest.approx(expected_difference(bench, with_prompt(prepared, make_prompt()), 0), rel=1e-4)
    batch["ref_latents"] = {"latents": torch.randn(2, 8, 1, 1, 1)}
    other = bench.regularizers(member).start(bench.mode.prepare(batch, make_draws()), batch, make_draws(), 0)
    assert float(member.separate_loss(other).detach()) != loss


def all_members(bench: Bench) -> list:
    prompt = make_prompt()
    return [
        PriorDivergence(bench.passes, 0.1),
        PromptPreservation("loss/blank_pres", bench.passes, prompt, 1.0),
        PromptPreservation("loss/dop", bench.passes, prompt, 1.0),
        AudioDop(bench.passes, silent_mode(bench.mode, None), 0.5),
    ]


def test_a_network_without_effect_loses_and_learns_nothing():
    """In training mode with dropout, where f_on and f_off still have to agree to the bit."""
    plain, kept = (Bench(AVMode(OPTIONS, CPU), trained=False, dropout=0.2) for _ in range(2))
    for bench, members in ((plain, []), (kept, all_members(kept))):
        torch.manual_seed(3)
        regularizers = bench.regularizers(*members)
        _, terms = bench.step(regularizers, make_batch())
        bench.total, bench.metrics = terms.total, regularizers.metrics()
    assert set(kept.metrics) == {"loss/prior_div", "loss/blank_pres", "loss/dop", "loss/audio_dop"}
    assert all(float(value) == 0 for value in kept.metrics.values())
    assert torch.equal(plain.total, kept.total) and torch.equal(plain.gradients(), kept.gradients())


@pytest.mark.parametrize(
    ("kind", "sound", "graphs"),
    [
        (PriorDivergence, [6, 6], [False, True]),
        (PromptPreservation, [6, 6], [True, False, True]),
        (AudioDop, [6, 6], [True]),
        (AudioDop, None, [True, False, True]),
    ],
)
def test_no_pass_more_than_documented(kind, sound, graphs):
    """The order of forwards, true for those with a backward pass."""
    bench = Bench(AVMode(OPTIONS, CPU))
    (member,) = [member for member in all_members(bench)[:1] + all_members(bench)[2:] if isinstance(member, kind)]
    calls, observed = count_calls(bench.model), []
    bench.model.register_forward_pre_hook(lambda model, _: observed.append(model.block_outputs is not None))
    bench.step(bench.regularizers(member), make_batch(sound=sound))
    assert calls == graphs
    assert not any(observed), "nobody asks for hidden states, so passes may be replayed from a recording"


def test_the_network_is_on_again_after_an_exception():
    bench = Bench(VideoMode(OPTIONS, CPU))
    batch, draws = make_batch(), make_draws()
    prepared = bench.mode.prepare(batch, draws)

    def fail(*_):
        raise RuntimeError("in the middle of the pass")

    handle = bench.model.transformer_blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="middle"):
        bench.passes.plain(prepared)
    handle.remove()
    assert all(adapter.enabled for _, adapter in bench.network.adapters()) and bench.network.training


def test_networks_without_a_switch_are_scaled_to_zero():
    class Foreign(torch.nn.Module):
        multiplier = 0.8

        def set_multiplier(self, value: float) -> None:
            self.multiplier = value

    network = Foreign()
    with pytest.raises(KeyError), switched_off(network):
        assert network.multiplier == 0.0
        raise KeyError
    assert network.multiplier == 0.8


def test_two_micro_batches_of_one_are_one_of_two():
    """Accumulation: gradients of halves, each with half the weight, equal those of the whole."""

    class Fixed:
        """Draws whose noise and levels are rows of one draw of two."""

        def __init__(self, rows: slice) -> None:
            self.rows, self.draws = rows, make_draws()

        def caption_dropout(self, count):
            return torch.zeros(count, dtype=torch.bool)

        first_frame = caption_dropout

        def sigma(self, tokens, buckets=None):
            return self.draws.sigma(torch.full((2,), int(tokens[0])), None)[self.rows]

        def noise(self, shape):
            return self.draws.noise((2, *shape[1:]))[self.rows]

        def again(self):
            return Fixed(self.rows)

    batch = make_batch()
    found = []
    for parts in ([(batch, slice(0, 2))], list(zip(halves(batch), (slice(0, 1), slice(1, 2))))):
        bench = Bench(AVMode(OPTIONS, CPU))
        members = all_members(bench)[1:]  # the cap of prior divergence is of each micro-batch's own loss
        for part, rows in parts:
            draws = Fixed(rows)
            regularizers = bench.regularizers(*members)
            work = regularizers.start(bench.mode.prepare(part, draws), part, draws, 0)
            regularizers.finish(work, lambda loss, parts=parts: (loss / len(parts)).backward())
        found.append(bench.gradients())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("multiplier", [1e-3, 50.0])
def test_prior_divergence_rewards_a_difference_up_to_its_cap(multiplier):
    bench = Bench(VideoMode(OPTIONS, CPU))
    batch = make_batch()
    prepared = bench.mode.prepare(batch, make_draws())
    difference = expected_difference(bench, prepared, 0)
    regularizers = bench.regularizers(PriorDivergence(bench.passes, multiplier))
    work, terms = bench.step(regularizers, batch)
    task = float(work.task)
    expected = -min(multiplier * difference, 0.1 * task)
    assert float(regularizers.metrics()["loss/prior_div"]) == pytest.approx(expected, rel=1e-4)
    assert float(terms.total.detach()) == pytest.approx(task + expected, rel=1e-5)


def test_prior_divergence_in_audio_mode_is_of_the_sound():
    bench = Bench(AudioMode(OPTIONS, CPU))
    batch = make_batch(sound=[6, 4])
    difference = expected_difference(bench, bench.mode.prepare(batch, make_draws()), 1)
    regularizers = bench.regularizers(PriorDivergence(bench.passes, 1e-3))
    bench.step(regularizers, batch)
    assert float(regularizers.metrics()["loss/prior_div"]) == pytest.approx(-1e-3 * difference, rel=1e-4)


def test_audio_dop_hears_noised_silence_beside_the_same_picture():
    options = dataclasses.replace(OPTIONS, independent_audio=True)
    bench = Bench(AVMode(options, CPU))
    silence = torch.randn(3, 32)
    member = AudioDop(bench.passes, silent_mode(bench.mode, silence), 0.5)
    batch, draws = make_batch(), make_draws(first_frame_p=0.5, caption_dropout_rate=0.5)
    work = bench.regularizers(member).start(bench.mode.prepare(batch, draws), batch, draws, 0)
    inputs = member._with_silence(work)
    for name in ("latent", "sigma", "timesteps", "context"):
        assert torch.equal(getattr(inputs.video, name), getattr(work.prepared.video, name)), name
    task = inputs.audio_task
    assert torch.equal(task.sigma, work.prepared.video_task.sigma), "one noise level for both streams"
    steps = task.target.shape[1]
    clean = silence.repeat(steps, 1)[:steps]  # 17 frames at 25 a second are 17 steps of 40 ms
    noise = task.target + clean
    torch.testing.assert_close(task.latent, (1 - task.sigma[:, None, None]) * clean + task.sigma[:, None, None] * noise)
    assert steps == 17 and inputs.audio.context.shape[-1] == 32
    expected = 0.5 * expected_difference(bench, inputs, 1)
    assert float(member.separate_loss(work).detach()) == pytest.approx(expected, rel=1e-4)


def test_losses_that_are_not_finite_are_left_out_and_counted(caplog):
    bench = Bench(VideoMode(OPTIONS, CPU))
    broken = make_prompt()
    broken.video[:] = float("nan")
    members = (
        PromptPreservation("loss/dop", bench.passes, broken, 1.0),
        PromptPreservation("loss/blank_pres", bench.passes, make_prompt(), 1.0),
    )
    regularizers = bench.regularizers(*members)
    bench.step(regularizers, make_batch())
    assert set(regularizers.metrics()) == {"loss/blank_pres"} and regularizers.skipped == {"loss/dop": 1}
    assert torch.isfinite(bench.gradients()).all()
    assert "loss/dop is not finite and left out (1 so far): item0, item1" in caplog.text


def test_preservation_holds_the_blank_prompt_while_the_trained_one_moves():
    blank, batch = make_prompt(), make_batch()
    for text in (blank.video, batch["conditions"]["video_prompt_embeds"]):
        text.mul_(3)  # so that the random model listens to its text
    moved = []
    for multiplier in (0.0, 3.0):
        bench = Bench(VideoMode(OPTIONS, CPU), layers=2, trained=False)
        regularizers = bench.regularizers(PromptPreservation("loss/blank_pres", bench.passes, blank, multiplier))
        optimizer = torch.optim.Adam(bench.network.parameters(), lr=1e-2)
        for index in range(40):
            bench.step(regularizers, batch, index=index)
            optimizer.step()
            optimizer.zero_grad()
        prepared = bench.mode.prepare(batch, make_draws(99))
        texts = (with_prompt(prepared, blank), prepared)
        moved.append([expected_difference(bench, text, 0) for text in texts])
    (free_blank, free_text), (held_blank, held_text) = moved
    assert held_blank < 0.1 * free_blank and held_text > 0.5 * free_text
