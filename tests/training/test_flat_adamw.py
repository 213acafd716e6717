"""Steps on runs of neighbours are torch's fused AdamW to the bit, whatever lies where; tested on CPU tensors."""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from ltx2_tuner.lora import LoRANetwork
from ltx2_tuner.side_by_side import empty, flat_of, joined, runs
from ltx2_tuner.training import optimizers
from ltx2_tuner.training.flat_adamw import FlatAdamW
from ltx2_tuner.training.optimizers import OptimizerOptions, create_optimizer, describe_optimizer
from ltx2_tuner.training.window import Gradients
from tests.training.tiny import Clip, train, write_workspace

SHAPES = [(64,), (4, 32), (192,), (8, 8), (5, 7), (2, 64)]  # one of them is no whole number of vectors
KEYWORDS = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
PLAIN = torch.optim.AdamW


def make(kind: type[PLAIN], shapes=SHAPES, split: int | None = None, dtype=torch.float32, **keywords) -> PLAIN:
    """An optimizer over parameters of these shapes, in two groups if they are to be split."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    groups = [{"params": parameters[:split]}]
    if split is not None:
        groups.append({"params": parameters[split:], "lr": 3e-3, "weight_decay": 0.02})
    return kind(groups, **(KEYWORDS | keywords))


def parameters_of(optimizer: PLAIN) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step(optimizer: PLAIN, seed: int, missing=frozenset(), neighbours: bool = True) -> None:
    """A step with random gradients, which lie side by side or not, and are missing at these indices."""
    generator = torch.Generator().manual_seed(seed)
    parameters = parameters_of(optimizer)
    values = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]
    if neighbours:
        places = empty([p.shape for p in parameters], values[0].dtype, values[0].device)
        torch._foreach_copy_(places, values)
        values = places
    for index, (parameter, value) in enumerate(zip(parameters, values)):
        parameter.grad = None if index in missing else value
    optimizer.step()


def assert_same(flat: PLAIN, plain: PLAIN) -> None:
    for index, (mine, theirs) in enumerate(zip(parameters_of(flat), parameters_of(plain), strict=True)):
        assert torch.equal(mine, theirs), index
        own, other = flat.state.get(mine, {}), plain.state.get(theirs, {})
        assert list(own) == list(other), index
        for key, value in other.items():
            assert own[key].dtype == value.dtype and torch.equal(own[key], value), (index, key)


@pytest.fixture
def stepped(monkeypatch) -> list[int]:
    """Gets the number of tensors of each call of the kernel."""
    counts: list[int] = []
    kernel = torch._fused_adamw_

    def count(params, *args, **keywords):
        counts.append(len(params))
        return kernel(params, *args, **keywords)

    monkeypatch.setattr(torch, "_fused_adamw_", count)
    return counts


EVENTS = ["move one", "move all", "reload", "exchange", "clone state", "forget", "give", "count apart", "scale"]
PLAN = st.lists(
    st.tuples(
        st.sets(st.integers(0, len(SHAPES) - 1)),  # without a gradient
        st.booleans(),  # whether gradients are neighbours
        st.sampled_from(["", "", *EVENTS]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(plan=PLAN, split=st.sampled_from([None, 1, 3]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_torch_whatever_happens_between_the_steps(plan, split, dtype) -> None:
    flat, plain = make(FlatAdamW, split=split, dtype=dtype), make(PLAIN, split=split, dtype=dtype)
    for seed, (missing, neighbours, event) in enumerate(plan):
        for optimizer in (flat, plain):
            befall(optimizer, event)
            step(optimizer, seed, missing, neighbours)
        if event == "exchange":
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (flat, plain)]
            plain.load_state_dict(states[0])
            flat.load_state_dict(states[1])
        assert_same(flat, plain)


def befall(optimizer: PLAIN, event: str) -> None:
    """Something that others may do to parameters or state."""
    parameters = parameters_of(optimizer)
    if event == "move one":
        parameters[1].data = parameters[1].data.clone()
    elif event == "move all":
        places = empty([p.shape for p in reversed(parameters)], parameters[0].dtype, parameters[0].device)
        for parameter, place in zip(reversed(parameters), places):
            parameter.data = place.copy_(parameter.data)
    elif event == "reload":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file))
    elif event == "clone state":
        for state in optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items()})
    elif event == "forget":
        optimizer.state.pop(parameters[0], None)
    elif event == "give":
        moments = {key: torch.ones_like(parameters[1]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameters[1]] = {"step": torch.tensor(3.0), **moments}
    elif event == "count apart":
        for parameter, count in zip(parameters, torch.arange(1.0, 20.0).unbind()):
            if optimizer.state.get(parameter):
                optimizer.state[parameter]["step"] = count
    elif event == "scale":  # steps with a loss scaler, the second of them with an overflow
        for missing, overflow in (({1, 2}, 0.0), ((), 1.0)):
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(overflow), torch.ones(())
            step(optimizer, 99, missing)
            del optimizer.found_inf, optimizer.grad_scale


def test_neighbours_are_one_tensor_and_strangers_are_not(stepped) -> None:
    optimizer = make(FlatAdamW, [(4, 32)] * 6)
    step(optimizer, 0)
    step(optimizer, 1, neighbours=False)
    step(optimizer, 2, missing={2})  # which is a step behind from now on
    step(optimizer, 3)
    assert stepped == [1, 6, 2, 3]
    parameters = parameters_of(optimizer)
    parameters[4].data = parameters[4].data.clone()
    step(optimizer, 4)
    assert stepped[-1] == 5


def test_gradients_at_the_old_addresses_may_be_neighbours_by_chance_now() -> None:
    memory = np.linspace(-1, 1, 6 * 64, dtype=np.float32)
    whole = list(torch.from_numpy(memory).view(6, 8, 8))
    apart = [torch.from_numpy(memory[64 * n : 64 * n + 64]).view(8, 8) for n in range(6)]
    pair = [make(kind, [(8, 8)] * 6) for kind in (FlatAdamW, PLAIN)]
    for optimizer in pair:
        for values in (whole, apart, whole):
            for parameter, value in zip(parameters_of(optimizer), values):
                parameter.grad = value
            optimizer.step()
    assert_same(*pair)


def test_counts_that_somebody_sets_are_read() -> None:
    pair = [make(kind, [(8, 8)] * 6) for kind in (FlatAdamW, PLAIN)]
    for optimizer in pair:
        step(optimizer, 0)
        for parameter, count in zip(parameters_of(optimizer), torch.arange(1.0, 7.0).unbind(), strict=True):
            optimizer.state[parameter]["step"] = count
        step(optimizer, 1)
    assert_same(*pair)


def test_a_copy_goes_its_own_way() -> None:
    flat, plain = make(FlatAdamW), make(PLAIN)
    step(flat, 0), step(plain, 0)
    other = copy.deepcopy(flat)
    step(other, 1), step(flat, 2), step(plain, 2)
    assert_same(flat, plain)
    plain = make(PLAIN)
    step(plain, 0), step(plain, 1)
    assert_same(other, plain)


def test_groups_have_runs_of_their_own(stepped) -> None:
    step(make(FlatAdamW, [(4, 32)] * 6, split=4), 0)
    assert stepped == [1, 1]


def test_those_that_come_and_go_together_stay_together(stepped) -> None:
    """As the adapters of the sound stream do, in a dataset where some clips are silent."""
    optimizer = make(FlatAdamW, [(4, 32)] * 6)
    for number in range(6):
        step(optimizer, number, missing={3, 4, 5} if number % 2 else ())
    assert stepped == [1, 1, 2, 1, 2, 1]


def test_a_loaded_state_lies_side_by_side_before_the_next_step(stepped) -> None:
    plain, flat = make(PLAIN, [(4, 32)] * 6), make(FlatAdamW, [(4, 32)] * 6)
    step(plain, 0)
    flat.load_state_dict(plain.state_dict())
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert flat_of([flat.state[p][key] for p in parameters_of(flat)], torch.float32) is not None
    before = [state["exp_avg"].clone() for state in plain.state.values()]
    step(flat, 1)
    assert stepped == [6, 1]
    assert all(map(torch.equal, before, [state["exp_avg"] for state in plain.state.values()]))  # not the same memory


def test_state_that_no_gradient_has_reached_is_not_there() -> None:
    flat = make(FlatAdamW)
    step(flat, 0, missing={0, 3})
    assert set(flat.state_dict()["state"]) == {1, 2, 4, 5}


def test_parameters_that_share_memory_stay_where_they_are() -> None:
    settled = empty([(64,), (64,)], torch.float32, torch.device("cpu"))
    parameters = [nn.Parameter(place.zero_()) for place in settled] + [nn.Parameter(torch.zeros(64)) for _ in range(2)]
    before = [p.data_ptr() for p in parameters]
    FlatAdamW([{"params": parameters}], fused=True)
    assert [p.data_ptr() for p in parameters[:2]] == before[:2]
    assert flat_of(parameters[2:], torch.float32) is not None and parameters[2].data_ptr() not in before


def test_parameters_that_are_one_another_stay_tied() -> None:
    first = nn.Parameter(torch.zeros(64))
    parameters = [first, nn.Parameter(first.data), nn.Parameter(torch.zeros(64))]
    FlatAdamW(parameters, fused=True)
    assert parameters[0].data_ptr() == parameters[1].data_ptr()


@pytest.mark.parametrize("keywords", [{"fused": None}, {"foreach": True, "fused": False}, {"amsgrad": True}])
def test_other_kinds_of_steps_are_torchs(keywords: dict) -> None:
    flat, plain = make(FlatAdamW, **keywords), make(PLAIN, **keywords)
    for number in range(3):
        step(flat, number), step(plain, number)
    assert_same(flat, plain)


def test_nothing_is_moved_that_is_not_fused() -> None:
    assert flat_of(parameters_of(make(FlatAdamW, [(64,)] * 3, fused=None)), torch.float32) is None


def test_keeps_memory_for_no_more_than_torch_does() -> None:
    flat = make(FlatAdamW, [(64,)] * 5)
    step(flat, 0)
    states = [flat.state[p] for p in parameters_of(flat)]
    for tensors in (parameters_of(flat), [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]):
        assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {5 * 64 * 4}


def test_hooks_and_closures_are_called_once() -> None:
    make(PLAIN)  # torch hooks the class of the first optimizer
    optimizer, calls = make(FlatAdamW), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    parameters = parameters_of(optimizer)

    def closure() -> torch.Tensor:
        calls.append("closure")
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in parameters]
    assert optimizer.step(closure) == sum(p.square().sum() for p in before)
    assert calls == ["pre", "closure", "post"]
    assert not any(map(torch.equal, before, parameters))


def test_a_loss_scaler_skips_what_overflowed() -> None:
    pair = make(FlatAdamW), make(PLAIN)
    for optimizer in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        for number, factor in enumerate((1.0, float("inf"), 2.0, 3.0)):
            loss = sum((p * factor).square().sum() for p in parameters_of(optimizer))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.state[parameters_of(optimizer)[0]]["step"] == number + (number == 0)
        step(optimizer, 5)
    assert_same(*pair)


def test_the_trainer_takes_it_for_adamw_and_names_it_so() -> None:
    options = OptimizerOptions("AdamW", {"fused": "true"})
    parameters = [nn.Parameter(torch.zeros(64)) for _ in range(2)]
    optimizer = create_optimizer(options, [{"params": parameters, "lr": 1e-3}])
    assert type(optimizer) is FlatAdamW and flat_of(parameters, torch.float32) is not None
    assert describe_optimizer(optimizer, options) == "torch.optim.adamw.AdamW(fused=true)"


def test_runs_write_what_they_write_with_torchs_own(tmp_path, checkpoint, monkeypatch, stepped) -> None:
    flags = ("--ltx2_mode", "av", "--save_state", "--optimizer_args", "fused=true")

    def lay(gradients: Gradients, *_flags: torch.Tensor) -> None:
        """As recorded passes do."""
        present = [p for p in gradients.parameters if p.grad is not None]
        for parameter, place in zip(present, empty([p.shape for p in present], torch.float32, present[0].device)):
            parameter.grad = place.copy_(parameter.grad)

    monkeypatch.setattr(Gradients, "gather", lay)
    written = []
    for kind in (PLAIN, FlatAdamW):
        monkeypatch.setattr(optimizers, "FlatAdamW", kind)
        space = write_workspace(tmp_path / kind.__name__, checkpoint, (Clip(sound=17), Clip()))
        train(space.arguments("--max_train_steps", 3, *flags))
        train(space.arguments("--max_train_steps", 6, "--resume", space.output / "tiny-state", *flags))
        state = space.output / "tiny-state"
        files = [space.output / "tiny.safetensors", state / "network.safetensors", state / "optimizer.safetensors"]
        written.append([load_file(file) for file in files])
        assert sum(file.stat().st_size for file in files) < 1.1 * sum(
            value.nbytes for tensors in written[-1] for value in tensors.values()
        ) + 4096 * sum(map(len, written[-1]))
    half = len(stepped) // 2
    assert 2 * max(stepped[half:]) <= min(stepped[:half])
    for mine, theirs in zip(*written):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_network_is_one_run_in_the_order_of_recorded_gradients(stepped) -> None:
    layers = {f"transformer_blocks.0.{name}": nn.Linear(64, 64) for name in ("attn1.to_q", "attn1.to_k", "attn2.to_v")}
    network = LoRANetwork(layers, 4)
    optimizer = FlatAdamW(network.parameters(), fused=True)
    step(optimizer, 0)
    assert stepped == [1] and len(parameters_of(optimizer)) == 6


# Gradients at the end of a window


@pytest.mark.parametrize("neighbours", [True, False])
def test_clipping_scales_all_gradients_to_the_norm(neighbours: bool, monkeypatch) -> None:
    optimizer = make(FlatAdamW)
    step(optimizer, 0, missing={2}, neighbours=neighbours)
    present = [p for p in parameters_of(optimizer) if p.grad is not None]
    before = [p.grad.clone() for p in present]
    names = ["audio_a", "b", "audio_c", "d", "audio_e", "f"]
    gradients = Gradients(parameters_of(optimizer), names, max_norm=0.5)
    scaled, multiply = [], torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda them, by: (scaled.append(len(them)), multiply(them, by)))
    norms = gradients.norms()
    gradients.clip(norms[0])
    total, audio = (torch.cat([g.flatten() for g in some]).norm() for some in (before, [before[0], before[3]]))
    torch.testing.assert_close(norms, torch.stack([total, audio, (total**2 - audio**2).sqrt()]))
    for parameter, old in zip(present, before):
        assert torch.equal(parameter.grad, old * (0.5 / (norms[0] + 1e-6)))
    assert scaled == [2 if neighbours else 5]


def test_norms_follow_which_gradients_are_there() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    gradients = Gradients(parameters, ["a", "audio_b", "audio_c"], max_norm=1.0)
    for present, expected in (((0, 1, 2), (3.0, 8**0.5, 1.0)), ((0, 2), (5**0.5, 2.0, 1.0)), ((1, 2), (8**0.5,) * 2)):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.tensor([2.0 if index else 1.0]) if index in present else None
        torch.testing.assert_close(gradients.norms()[: len(expected)], torch.tensor(expected))


# Runs


def is_run(column: list[torch.Tensor]) -> bool:
    """What `runs` promises of a range, in other words."""
    return len(column) == 1 or flat_of(column, column[0].dtype) is not None


TENSORS = st.lists(st.sampled_from(["next", "gap", "other", "half", "across"]), min_size=1, max_size=12)


def tensors(kinds: list[str], count: int) -> list[torch.Tensor]:
    """A column of (4, 4) tensors: the next in memory, after a gap, elsewhere, of another dtype, or transposed."""
    memory, place, column = torch.zeros(32 * count), 0, []
    for kind in (*kinds, *["next"] * count)[:count]:
        place += 16 * (kind == "gap")
        piece = memory[place : place + 16].view(4, 4)
        place += 16
        variants = {"other": torch.zeros(4, 4), "half": piece.view(torch.int32), "across": piece.T}
        column.append(variants.get(kind, piece))
    return column


@given(kinds=TENSORS, others=TENSORS)
def test_runs_are_as_long_as_neighbours_reach_in_every_column(kinds: list[str], others: list[str]) -> None:
    columns = tensors(kinds, len(kinds)), tensors(others, len(kinds))
    found = runs(*columns)
    assert [index for first, end in found for index in range(first, end)] == list(range(len(kinds)))
    for first, end in found:
        for column in columns:
            assert is_run(column[first:end])
            flat = joined(column[first:end])
            assert flat.numel() == 16 * (end - first) and flat.data_ptr() == column[first].data_ptr()
    for (first, end), _ in itertools.pairwise(found):
        assert not all(is_run(column[first : end + 1]) for column in columns)


def test_separate_memory_that_is_next_by_chance_ends_a_run() -> None:
    memory = np.zeros(256, dtype=np.float32)
    halves = [torch.from_numpy(memory[:128]), torch.from_numpy(memory[128:])]
    assert halves[0].data_ptr() + halves[0].nbytes == halves[1].data_ptr()
    assert runs([*halves[0].split(64), *halves[1].split(64)]) == [(0, 2), (2, 4)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_torch_on_a_gpu():
    shapes = [(4096, 32), (32, 4096), (64,), (5, 7), (32, 2048)] * 3
    made = []
    for kind in (FlatAdamW, PLAIN):
        parameters = [nn.Parameter(p.detach().cuda()) for p in parameters_of(make(kind, shapes))]
        made.append(kind(parameters, **KEYWORDS))
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            places = empty([p.shape for p in parameters], torch.float32, torch.device("cuda"))
            torch._foreach_copy_(places, [torch.randn(p.shape, generator=generator).cuda() for p in parameters])
            for parameter, place in zip(parameters, places):
                parameter.grad = place
            made[-1].step()
    assert_same(*made)
    joint = [p for p in parameters_of(made[0]) if p.numel() % 64 == 0]
    assert len({p.untyped_storage().data_ptr() for p in joint}) == 1
