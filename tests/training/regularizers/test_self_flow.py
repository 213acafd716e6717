"""Self-Flow: the two views, the three teachers, the weights of the terms, and what is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.modes import VideoMode
from ltx2_tuner.training.regularizers import SelfFlowOptions, Work
from ltx2_tuner.training.regularizers.passes import switched_off
from ltx2_tuner.training.regularizers.self_flow import PROJECTOR, TEACHER, SelfFlow, at_level
from tests.training.regularizers.setting import WIDTH, Bench, count_calls
from tests.training.test_modes import CPU, OPTIONS, make_batch, make_draws

FRAMES = 3


def make_self_flow(bench: Bench, **options) -> SelfFlow:
    return SelfFlow(
        SelfFlowOptions(**options),
        bench.passes,
        blocks=(1, 2),
        width=WIDTH,
        seed=7,
        device=torch.device("cpu"),
        learning_rate=1e-3,
    )


@pytest.fixture
def bench() -> Bench:
    return Bench(VideoMode(OPTIONS, CPU))


def views(bench: Bench, member: SelfFlow, index: int = 0, **draws):
    """What the mode prepared, the teacher's view and the student's work."""
    seen = []
    teach = bench.passes.features
    passes = dataclasses.replace(bench.passes)
    object.__setattr__(passes, "features", lambda video, block: (seen.append(video), teach(video, block))[1])
    member.passes = passes
    batch, draws = make_batch(), make_draws(index, **draws)
    prepared = bench.mode.prepare(batch, draws)
    work = bench.regularizers(member).start(prepared, batch, draws, 0)
    return prepared, (seen[0] if seen else None), work


# -- the two views


@pytest.mark.parametrize("first_frame", [0.0, 1.0])
def test_both_views_share_noise_target_and_the_given_frame(bench, first_frame):
    member = make_self_flow(bench, mask_ratio=0.5)
    prepared, teacher, work = views(bench, member, first_frame_p=first_frame)
    task, student = prepared.video_task, work.prepared.video
    first, second, _ = student.timesteps.T  # (B,) each, and zeros
    assert torch.equal(first, task.sigma) and not torch.equal(first, second)
    levels = student.timesteps.gather(1, student.timestep_index)  # (B, T)
    assert torch.equal(work.prepared.video_task.target, task.target)
    given = torch.zeros(2, 12, dtype=torch.bool)
    given[:, :4] = bool(first_frame)
    assert (levels[given] == 0).all() and (levels[~given] > 0).all()
    assert torch.equal(student.latent[given], prepared.video.latent[given])
    # The same line through clean and noise for every token: x = clean + level * target.
    clean = task.latent - torch.where(given, 0.0, task.sigma[:, None])[..., None] * task.target
    torch.testing.assert_close(student.latent, clean + levels[..., None] * task.target, atol=1e-5, rtol=1e-5)
    lower = torch.minimum(first, second)
    seen = torch.where(given, 0.0, lower[:, None])
    torch.testing.assert_close(teacher.latent, clean + seen[..., None] * task.target, atol=1e-5, rtol=1e-5)
    assert torch.equal(teacher.sigma, lower) and torch.equal(teacher.timesteps[:, 0], lower)
    assert torch.equal(teacher.context, student.context)
    mask = work.prepared.video_task.sigma  # mean level, conditioned or not
    assert torch.equal(mask, student.sigma) and ((mask >= lower) & (mask <= torch.maximum(first, second))).all()


def test_levels_follow_their_distribution(bench):
    """The second level is drawn like the first, independently; masks hit their share of tokens."""
    member, batch = make_self_flow(bench, mask_ratio=0.2), make_batch()
    found = []
    for index in range(2000):
        draws = make_draws(index)
        work = Work(bench.mode.prepare(batch, draws), batch, draws, 0)
        found.append(member._draw(work, work.prepared.video_task))
    first, second = (torch.cat([getattr(noise, name) for noise in found]) for name in ("first", "second"))
    masked = torch.cat([noise.mask.float() for noise in found])
    assert abs(float(first.mean() - second.mean())) < 0.03 and abs(float(first.std() - second.std())) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1
    assert abs(float(masked.mean()) - 0.2) < 0.02
    assert float(masked.mean(0).std()) < 0.02, "every token is as likely"


def test_masks_of_whole_frames(bench):
    member = make_self_flow(bench, mask_ratio=0.5, frame_level_mask=True)
    found = [views(bench, member, index)[2].prepared.video.timestep_index for index in range(5)]
    by_frame = torch.stack(found).unflatten(2, (FRAMES, 4))
    assert (by_frame == by_frame[..., :1]).all() and by_frame.float().std() > 0


def test_one_timestep_for_all_tokens(bench):
    member = make_self_flow(bench, mask_ratio=0.5, tokenwise_timestep=False)
    prepared, _, work = views(bench, member)
    assert work.prepared.video.timesteps.shape == (2, 1) and work.prepared.video.timestep_index is None
    assert torch.equal(work.prepared.video.timesteps[:, 0], work.prepared.video.sigma)
    assert not torch.equal(work.prepared.video.latent, prepared.video.latent), "the tokens keep their own noise"
    given = views(bench, member, first_frame_p=1.0)[2].prepared.video
    assert given.timesteps.shape == (2, 2) and (given.timestep_index[:, :4] == 1).all()


def test_without_dual_noise_both_see_the_same(bench):
    prepared, teacher, work = views(bench, make_self_flow(bench, dual_timestep=False))
    assert work.prepared is prepared and torch.equal(teacher.latent, prepared.video.latent)
    assert work.metrics["self_flow/tau_mean"] == pytest.approx(work.metrics["self_flow/tau_min_mean"])


def test_the_student_block_moves_within_its_range():
    bench = Bench(VideoMode(OPTIONS, CPU))
    member = make_self_flow(bench, student_block_stochastic_range=5)
    member.teacher = 3
    assert {member._draw_block(make_draws(index)) for index in range(40)} == {0, 1, 2}
    fixed = make_self_flow(bench)
    assert fixed._draw_block(None) == 1, "nothing is drawn"


# -- the teacher


def test_the_base_teacher_is_the_plain_model_up_to_its_block(bench):
    member = make_self_flow(bench)
    ran = []
    bench.model.transformer_blocks[3].register_forward_hook(lambda *_: ran.append(1))
    _, teacher, _ = views(bench, member)
    assert not ran, "later blocks do not run"
    found = []
    with torch.no_grad(), switched_off(bench.network):
        bench.model.block_outputs = lambda index, video, _: found.append(video)
        bench.model(teacher, None)
        bench.model.block_outputs = None
    assert torch.equal(member._features, found[2]) and not member._features.requires_grad
    assert all(adapter.enabled for _, adapter in bench.network.adapters()) and bench.network.training


@pytest.mark.parametrize("on_host", [False, True])
def test_the_ema_teacher_follows_its_recurrence(bench, on_host):
    member = make_self_flow(
        bench, teacher_mode="ema", teacher_momentum=0.9, teacher_update_interval=2, offload_teacher_params=on_host
    )
    parameters = dict(bench.network.named_parameters())
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(1, 7):
        for parameter in parameters.values():
            parameter.data += 0.1 * step
        member.after_step()
        if step % 2 == 0:
            expected = {name: 0.9 * expected[name] + 0.1 * parameters[name].detach() for name in parameters}
    assert member.shadows.values.keys() == parameters.keys()
    for name, value in member.shadows.values.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(KeyError), member.shadows.in_place():
        name = next(iter(parameters))
        assert torch.equal(parameters[name], member.shadows.values[name])
        raise KeyError
    assert all(torch.equal(parameters[name], current[name]) for name in parameters)


def test_the_partial_teacher_replaces_its_block_alone(bench):
    member = make_self_flow(bench, teacher_mode="partial_ema")
    names = member.shadows.values.keys()
    assert names and all("transformer_blocks_2_" in name for name in names)
    assert len(names) < len(list(bench.network.parameters()))
    with pytest.raises(UserError, match="no adapter is in the teacher block 9"):
        SelfFlow(
            SelfFlowOptions(teacher_mode="partial_ema"),
            bench.passes,
            blocks=(1, 9),
            width=WIDTH,
            seed=0,
            device=torch.device("cpu"),
            learning_rate=1e-3,
        )


def test_features_may_wait_in_host_memory(bench):
    results = []
    for offload in (False, True):
        regularizers = bench.regularizers(make_self_flow(bench, offload_teacher_features=offload))
        bench.step(regularizers, make_batch())
        results.append(float(regularizers.metrics()["loss/self_flow"]))
    assert results[0] == results[1]


def test_one_pass_more_and_none_while_the_weights_are_zero(bench):
    calls = count_calls(bench.model)
    runs = []
    bench.model.transformer_blocks[0].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    bench.step(bench.regularizers(make_self_flow(bench)), make_batch(), step=9)
    assert runs == [False, True] and calls == [True], "the teacher's pass ends at its block"
    regularizers = bench.regularizers(make_self_flow(bench, temporal_warmup_steps=5))
    runs.clear()
    bench.step(regularizers, make_batch(), step=0)
    assert runs == [True] and "loss/self_flow" not in regularizers.metrics()


# -- the terms


def test_focus_is_on_tokens_noisier_than_the_teachers(bench):
    member = make_self_flow(bench, mask_ratio=0.5, mask_focus_loss=True)
    for index in range(6):
        _, _, work = views(bench, member, index, first_frame_p=1.0)
        first, second, _ = work.prepared.video.timesteps.T
        expected = (work.prepared.video.timestep_index == 1) & (second > first)[:, None]
        assert torch.equal(member._raised, expected) and not member._raised[:, :4].any()


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_all_weights_follow_the_schedule_and_the_sum_is_capped(bench, kind):
    weights = {"lambda_self_flow": 0.3, "lambda_temporal": 0.2, "lambda_delta": 0.1, "temporal_mode": "hybrid"}
    base = bench.regularizers(make_self_flow(bench, **weights))
    bench.step(base, make_batch(), step=6)
    full = base.metrics()
    expected = 0.3 * -full["self_flow/cosine"] + 0.2 * -full["self_flow/frame_cosine"]
    expected += 0.1 * -full["self_flow/delta_cosine"]
    assert float(full["loss/self_flow"]) == pytest.approx(float(expected), rel=1e-5)
    settings = {"temporal_schedule": kind, "temporal_warmup_steps": 4, "temporal_max_steps": 8}
    regularizers = bench.regularizers(make_self_flow(bench, **weights, **settings))
    bench.step(regularizers, make_batch(), step=6)
    found = regularizers.metrics()
    factor = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[kind]
    assert float(found["loss/self_flow"]) == pytest.approx(factor * float(full["loss/self_flow"]), rel=1e-5)
    for name in ("lambda_self_flow", "lambda_temporal", "lambda_delta"):
        assert float(found[f"self_flow/{name}"]) == pytest.approx(factor * weights[name])
    capped = bench.regularizers(make_self_flow(bench, **weights, max_loss=1e-3, loss_type="one_minus_cosine"))
    bench.step(capped, make_batch(), step=6)
    assert float(capped.metrics()["loss/self_flow"]) == pytest.approx(1e-3, rel=1e-5)


def test_max_steps_zero_is_no_decay(bench):
    member = make_self_flow(bench, temporal_schedule="linear", temporal_warmup_steps=2)
    assert [member._factor(step) for step in (0, 1, 2, 500)] == [0, 0.5, 1, 1]


def test_single_frames_have_no_term_over_time(bench):
    weights = {"lambda_temporal": 0.2, "lambda_delta": 0.1, "temporal_mode": "hybrid"}
    regularizers = bench.regularizers(make_self_flow(bench, **weights))
    bench.step(regularizers, make_batch(frames=1))
    found = regularizers.metrics()
    assert "self_flow/frame_cosine" not in found and "self_flow/cosine" in found
    alone = bench.regularizers(make_self_flow(bench, lambda_self_flow=0.0, **weights))
    bench.step(alone, make_batch(frames=1))
    assert "loss/self_flow" not in alone.metrics()


# -- parts and state


def test_the_projector_has_the_documented_form(bench):
    member = make_self_flow(bench, projector_hidden_multiplier=2, projector_lr=5e-4)
    state = member.projector.state_dict()
    shapes = {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (64, 128), "2.bias": (64,)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    (trained,) = member.trained()
    assert trained.learning_rate == 5e-4 and make_self_flow(bench).trained()[0].learning_rate == 1e-3
    x = torch.randn(2, 64)
    hidden = x @ state["0.weight"].T + state["0.bias"]
    expected = hidden * torch.sigmoid(hidden) @ state["2.weight"].T + state["2.bias"]
    torch.testing.assert_close(member.projector(x), expected)


def test_state_round_trip_and_its_warnings(bench, tmp_path, caplog):
    member = make_self_flow(bench, teacher_mode="ema")
    member.projector[0].bias.data += 1
    member.shadows.steps = 5
    state = {stem: {name: t.clone() for name, t in group.items()} for stem, group in member.state().items()}
    assert set(state) == {PROJECTOR, TEACHER}
    assert state[TEACHER]["__self_flow_step_counter__"].tolist() == [5]
    assert sum(name.startswith("shadow::lora_unet_") for name in state[TEACHER]) == len(state[TEACHER]) - 1
    fresh = make_self_flow(bench, teacher_mode="ema")
    fresh.load_state(state, tmp_path)
    assert fresh.shadows.steps == 5 and torch.equal(fresh.projector[0].bias, member.projector[0].bias)
    make_self_flow(bench).load_state(state, tmp_path)
    assert "which teacher_mode=base does not use" in caplog.text
    make_self_flow(bench, teacher_mode="ema").load_state({}, tmp_path)
    assert "the projector starts fresh" in caplog.text and "starts as a copy" in caplog.text
    with pytest.raises(UserError, match="of other parameters"):
        make_self_flow(bench, teacher_mode="partial_ema").load_state(state, tmp_path)


def test_levels_move_along_the_line_of_the_noise():
    batch = make_batch()
    task = VideoMode(OPTIONS, CPU).prepare(batch, make_draws(first_frame_p=1.0)).video_task
    moved = at_level(task, torch.zeros(2, 12))
    clean = batch["latents"]["latents"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(moved, clean, atol=1e-5, rtol=1e-5)


def test_features_drift_less_from_the_base_than_without():
    """The task pulls the adapted student away from the plain model's features; Self-Flow holds it."""
    drifts = []
    for strength in (0.0, 20.0):
        bench = Bench(VideoMode(OPTIONS, CPU), trained=False)
        weights = {"lambda_self_flow": 0.0, "lambda_temporal": strength, "temporal_mode": "frame"}
        settings = {"temporal_granularity": "patch", "num_neighbors": 0, "dual_timestep": False}
        members = [make_self_flow(bench, **weights, **settings)] if strength else []
        regularizers = bench.regularizers(*members)
        optimizer = torch.optim.Adam(bench.network.parameters(), lr=1e-2)
        for index in range(25):
            bench.step(regularizers, make_batch(), index=index)
            optimizer.step()
            optimizer.zero_grad()
        video = bench.mode.prepare(make_batch(), make_draws(99)).video
        with switched_off(bench.network):
            base = bench.passes.features(video, 2)
        drifts.append(1 - float(cosine_similarity(bench.passes.features(video, 1), base, dim=-1).mean()))
    assert drifts[1] < 0.8 * drifts[0]
