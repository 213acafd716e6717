"""CREPA against its sum written as loops, its schedules, its projector and its two teachers."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from safetensors.torch import save_file

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.modes import AVMode, ModeOptions, V2VMode, VideoMode
from ltx2_tuner.training.regularizers import CrepaOptions
from ltx2_tuner.training.regularizers.crepa import Crepa, alignment_loss, check_features
from ltx2_tuner.training.regularizers.options import DINO_WIDTHS
from ltx2_tuner.training.regularizers.schedule import schedule_factor
from tests.training.regularizers.setting import WIDTH, Bench, count_calls
from tests.training.test_modes import CPU, OPTIONS, make_batch, make_draws


def make_crepa(folder, **options) -> Crepa:
    settings = {"student_block_idx": 1, "teacher_block_idx": 3, **options}
    return Crepa(
        CrepaOptions(**settings),
        width=WIDTH,
        seed=7,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        max_steps=100,
        learning_rate=1e-3,
        output_dir=folder,
    )


def loops(similarity: list[list[float]], neighbors: int, tau: float) -> tuple[float, float]:
    """Sum over frames and neighbours, and the number of its terms, as the definition says."""
    frames = len(similarity)
    total, terms = 0.0, 0
    for f in range(frames):
        total, terms = total + similarity[f][f], terms + 1
        for k in range(1, neighbors + 1):
            for g in (f - k, f + k):
                if 0 <= g < frames:
                    total, terms = total + math.exp(-k / tau) * similarity[f][g], terms + 1
    return total, terms


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize(("neighbors", "tau"), [(2, 1.0), (0, 1.0), (9, 0.3)])
def test_alignment_is_the_sum_over_frames_and_neighbours(frames, neighbors, tau):
    similarity = torch.randn(2, frames, frames)
    sums, terms = zip(*(loops(sample.tolist(), neighbors, tau) for sample in similarity))
    expected = -(sum(sums) / 2) / max(terms[0] / frames, 1)
    assert float(alignment_loss(similarity, neighbors, tau)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_backbone_compares_means_of_frames(tmp_path, normalize):
    """The student's frames are projected token by token, then averaged; the teacher is a deeper block's output."""
    bench = Bench(VideoMode(OPTIONS, CPU))
    crepa = make_crepa(tmp_path, normalize=normalize, num_neighbors=1, lambda_crepa=0.3)
    regularizers, batch = bench.regularizers(crepa), make_batch()
    seen = {}
    for index in (1, 3):
        block = bench.model.transformer_blocks[index]
        block.register_forward_hook(lambda _m, _i, out, index=index: seen.update({index: out[0].detach()}))
    bench.step(regularizers, batch)
    student, teacher = (seen[index].unflatten(1, (3, 4)) for index in (1, 3))
    with torch.no_grad():
        mine = crepa.projector(student).mean(dim=2)
    theirs = teacher.mean(dim=2)
    if normalize:
        mine, theirs = mine / mine.norm(dim=-1, keepdim=True), theirs / theirs.norm(dim=-1, keepdim=True)
    total = 0.0
    for b in range(2):
        similarity = [[float(mine[b, f] @ theirs[b, g]) for g in range(3)] for f in range(3)]
        value, terms = loops(similarity, 1, 1.0)
        total += value / 2
    expected = -0.3 * total / (terms / 3)
    assert float(regularizers.metrics()["loss/crepa"]) == pytest.approx(expected, rel=1e-4)
    assert bench.gradients().abs().sum() > 0 and crepa.projector.net[0].weight.grad is not None


def test_dino_resizes_the_grid_in_two_dimensions(tmp_path):
    """Frames of the clip by floor(linspace), patches of a 37 x 37 grid, rows not mixed."""
    bench = Bench(VideoMode(OPTIONS, CPU))
    crepa = make_crepa(tmp_path, mode="dino", dino_model="dinov2_vits14", num_neighbors=1, tau=2.0)
    regularizers, batch = bench.regularizers(crepa), make_batch()
    features = torch.randn(2, 17, 1369, 384).half()
    batch["conditions"]["dino_features"] = features
    seen = []
    bench.model.transformer_blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
    bench.step(regularizers, batch)
    with torch.no_grad():
        projected = crepa.projector(seen[0]).reshape(2, 3, 2, 2, 384)
    total = 0.0
    for b in range(2):
        mine, theirs = [], []
        for f in range(3):
            grid = torch.zeros(37, 37, 384)
            for row in range(37):
                for column in range(37):
                    grid[row, column] = bilinear(projected[b, f], row, column)
            mine.append(torch.nn.functional.normalize(grid.flatten(0, 1), dim=-1))
            theirs.append(torch.nn.functional.normalize(features[b, (0, 8, 16)[f]].float(), dim=-1))
        similarity = [[float((mine[f] * theirs[g]).sum(-1).mean()) for g in range(3)] for f in range(3)]
        value, terms = loops(similarity, 1, 2.0)
        total += value / 2
    expected = -0.1 * total / (terms / 3)
    assert float(regularizers.metrics()["loss/crepa"]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def bilinear(grid: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Value of a 37 x 37 resize of a (2, 2, D) grid, corners not aligned."""
    value = torch.zeros(grid.shape[-1])
    y, x = ((place + 0.5) * 2 / 37 - 0.5 for place in (row, column))
    y, x = min(max(y, 0.0), 1.0), min(max(x, 0.0), 1.0)
    for i, wy in ((0, 1 - y), (1, y)):
        for j, wx in ((0, 1 - x), (1, x)):
            value += wy * wx * grid[i, j]
    return value


def test_batches_without_features_contribute_nothing(tmp_path, caplog):
    bench = Bench(VideoMode(OPTIONS, CPU))
    regularizers = bench.regularizers(make_crepa(tmp_path, mode="dino", dino_model="dinov2_vits14"))
    for index in range(2):
        work, terms = bench.step(regularizers, make_batch(), index=index)
        assert terms.total.detach() == work.task
    assert caplog.text.count("no DINO features for item0, item1") == 1


@pytest.mark.parametrize("mode", ["av", "v2v", "checkpointed"])
def test_the_main_pass_alone_is_read_once_and_connected(tmp_path, mode):
    """With sound, behind references, under recomputation: one pass, gradients, target tokens alone."""
    batch = make_batch(sound=[6, 6] if mode == "av" else None)
    chosen = AVMode(OPTIONS, CPU)
    if mode != "av":
        batch["ref_latents"] = {"latents": torch.randn(2, 8, 1, 1, 1)}
        chosen = V2VMode(ModeOptions(reference_downscale=2), CPU)
    bench = Bench(chosen)
    gradients = []
    for recompute in {False, mode == "checkpointed"}:
        bench.model.enable_gradient_checkpointing(recompute)
        crepa = make_crepa(tmp_path)
        regularizers, calls, taken = bench.regularizers(crepa), count_calls(bench.model), []
        bench.network.zero_grad()
        draws = make_draws()
        work = regularizers.start(bench.mode.prepare(batch, draws), batch, draws, 0)
        with regularizers.watching(work):
            work.prepared.run(bench.model)
        taken = dict(work.hidden)
        assert set(taken) == {1, 3} and all(hidden.shape == (2, 12, WIDTH) for hidden in taken.values())
        assert taken[1].requires_grad and bench.model.block_outputs is None
        crepa.loss(work).backward()
        assert len(calls) == 1 and work.hidden.keys() == taken.keys()
        gradients.append(bench.gradients())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[-1])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_and_decay_of_every_schedule(kind):
    values = [schedule_factor(kind, step, 4, 12) for step in range(15)]
    assert values[:4] == [0, 0.25, 0.5, 0.75] and values[4] == 1
    share = [min((step - 4) / 8, 1) for step in range(4, 15)]
    curves = {"constant": [1.0] * 11, "linear": [1 - u for u in share]}
    curves["cosine"] = [(1 + math.cos(math.pi * u)) / 2 for u in share]
    assert values[4:] == pytest.approx(curves[kind])


def test_a_strength_of_zero_runs_no_projector(tmp_path):
    bench = Bench(VideoMode(OPTIONS, CPU))
    for options, step in (({"warmup_steps": 5}, 0), ({"lambda_crepa": 0.0}, 3), ({"schedule": "linear"}, 100)):
        crepa = make_crepa(tmp_path, **options)
        crepa.projector.register_forward_hook(lambda *_: pytest.fail("the projector ran"))
        regularizers = bench.regularizers(crepa)
        bench.step(regularizers, make_batch(), step=step)
        assert not regularizers.metrics()


def test_max_steps_ends_the_schedule_and_the_run_where_it_is_absent(tmp_path):
    assert make_crepa(tmp_path).end == 100 and make_crepa(tmp_path, max_steps=30).end == 30


def test_the_projector_has_the_documented_form_and_a_start_of_its_own(tmp_path):
    first, second = make_crepa(tmp_path), make_crepa(tmp_path)
    state = first.projector.state_dict()
    shapes = {"net.0.weight": (64, 64), "net.0.bias": (64,), "net.2.weight": (64, 64), "net.2.bias": (64,)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(torch.equal(tensor, second.projector.state_dict()[name]) for name, tensor in state.items())
    x = torch.randn(3, 64)
    hidden = x @ state["net.0.weight"].T + state["net.0.bias"]
    exact = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = exact @ state["net.2.weight"].T + state["net.2.bias"]
    torch.testing.assert_close(first.projector(x.double()), expected, atol=1e-5, rtol=1e-5)
    for name, width in DINO_WIDTHS.items():
        assert make_crepa(tmp_path, mode="dino", dino_model=name).projector.net[2].out_features == width


def test_a_projector_in_the_output_folder_is_taken_up_if_it_fits(tmp_path, caplog):
    caplog.set_level("INFO")
    kept = {name: tensor + 1 for name, tensor in make_crepa(tmp_path).projector.state_dict().items()}
    save_file(kept, tmp_path / "crepa_projector.safetensors")
    loaded = make_crepa(tmp_path).projector.state_dict()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    assert "projector loaded from" in caplog.text
    other = make_crepa(tmp_path, mode="dino", dino_model="dinov2_vits14")
    assert other.projector.net[2].out_features == 384 and "does not fit" in caplog.text
    (tmp_path / "crepa_projector.safetensors").write_bytes(b"cut")
    assert make_crepa(tmp_path) and "it is not used" in caplog.text


def test_features_of_another_model_are_refused():
    options = CrepaOptions(mode="dino", dino_model="dinov2_vits14")
    good = ({"dino_model": "dinov2_vits14"}, (9, 1369, 384))
    check_features(options, {"a": good, "b": ({}, (9, 1369, 384))})
    for headers, expected in (
        ({}, "the caches hold none; run ltx2_cache_dino_features.py --dino_model dinov2_vits14"),
        ({"a": good, "b": ({"dino_model": "dinov2_vitb14"}, (9, 1369, 768))}, "b: features of dinov2_vitb14"),
        ({"a": ({}, (9, 1369, 768))}, r"a: features of dinov2_vits14 \(width 768\)"),
        ({"a": ({}, (9, 1000, 384))}, "no grid of patches"),
    ):
        with pytest.raises(UserError, match=expected):
            check_features(options, headers)


def test_crepa_makes_neighbouring_frames_more_alike(tmp_path):
    """From about nothing, the similarity of projected frames to their neighbours' teacher comes near its best."""
    bench = Bench(VideoMode(OPTIONS, CPU), trained=False)
    crepa = make_crepa(tmp_path, lambda_crepa=5.0)
    regularizers, batch = bench.regularizers(crepa), make_batch()
    parameters = [*bench.network.parameters(), *crepa.projector.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(30):
        bench.step(regularizers, batch)
        losses.append(float(regularizers.metrics()["loss/crepa"]))
        optimizer.step()
        optimizer.zero_grad()
    terms = 3 + 2 * 2 + 2  # of three frames: themselves, next and next but one
    best = -5 * (3 + 4 * math.exp(-1) + 2 * math.exp(-2)) / (terms / 3)
    assert abs(losses[0]) < 0.3 * abs(best)
    assert losses[-1] < 0.7 * best
