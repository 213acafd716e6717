"""Joint projections and working copies change nothing but the number of products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ltx2_tuner.lora import LoRALinear, LoRANetwork, Targets, joint, select_layers
from ltx2_tuner.lora.joint import join_adapters
from ltx2_tuner.lora.working_copies import WorkingCopies
from ltx2_tuner.memory.compilation import compile_blocks
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model
from ltx2_tuner.memory.streaming import BlockStore
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization import Fp8Linear, QuantisedLinear, expand
from ltx2_tuner.quantization.formats import WeightFormat, freeze
from ltx2_tuner.training.regularizers.ema import Shadows
from tests.memory import blocks
from tests.models.transformer import tiny


def adapted(version: str = "2.3", **settings: object) -> tuple[LTXTransformer, LoRANetwork]:
    model = tiny.model(
        version,
        attention_head_dim=32,
        audio_attention_head_dim=16,
        cross_attention_dim=64,
        audio_cross_attention_dim=32,
    )
    network = LoRANetwork(select_layers(model, Targets("av", "t2v")), 4, alphas=2.0, **settings)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    network.attach(model)
    return model.train(), network.train()


def step(model: LTXTransformer, network: LoRANetwork, **streams: object) -> list[torch.Tensor]:
    """Velocities, and the gradients of all adapters."""
    streams = streams or tiny.inputs(model.config)
    network.zero_grad(set_to_none=True)
    velocities = [velocity for velocity in model(**streams) if velocity is not None]
    sum(velocity.float().square().mean() for velocity in velocities).backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [*(velocity.detach() for velocity in velocities), *grads]


def assert_alike(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected) > 4
    for pair in zip(actual, expected):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_joint_projections_give_the_same_step(version: str, recompute: bool) -> None:
    model, network = adapted(version)
    expected = step(model, network)
    names = list(model.state_dict())
    weight = model.transformer_blocks[0].attn1.to_k.weight.clone()
    join_adapters(model, network, torch.float32)
    model.enable_gradient_checkpointing(recompute)
    assert_alike(step(model, network), expected)
    assert list(model.state_dict()) == names
    attention = model.transformer_blocks[0].attn1
    assert torch.equal(attention.to_k.weight, weight)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (attention.to_q, attention.to_k, attention.to_v)}
    assert len(storages) == 1, "the joint weight must not be a second copy"
    assert all(adapter.copies is not None for _, adapter in network.adapters())


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True], ids=["kept", "recomputed"])
def test_compiled_parts_give_the_same_step_without_graph_breaks(recompute: bool) -> None:
    model, network = adapted()
    expected = step(model, network)
    join_adapters(model, network, torch.float32)
    model.enable_gradient_checkpointing(recompute)
    torch._dynamo.reset()
    compile_blocks(model.transformer_blocks, backend="aot_eager", fullgraph=True)
    assert_alike(step(model, network), expected)


def test_compiled_gradients_of_the_copies_are_laid_out_like_them() -> None:
    """One that is not sends the copy to the masters down a slow path, matrix by matrix."""
    model, network = adapted()
    copies = join_adapters(model, network, torch.float32)
    torch._dynamo.reset()
    compile_blocks(model.transformer_blocks, backend="aot_eager_decomp_partition")
    with copies.recorded() as leaves:
        loss = sum(velocity.square().mean() for velocity in model(**tiny.inputs(model.config)))
        gradients = torch.autograd.grad(loss, leaves)
    assert all(gradient.is_contiguous() for gradient in gradients)
    assert any(leaf.dim() == 3 and leaf.shape[0] == 3 for leaf in leaves)


def test_dropout_and_differing_ranks_keep_adapters_apart() -> None:
    model = tiny.model()
    layers = select_layers(model, Targets("av", "t2v"))
    ranks = {path: 2 if path.endswith("to_v") else 3 for path in layers}
    network = LoRANetwork(layers, ranks).attach(model).train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    expected = step(model.train(), network)
    copies = join_adapters(model, network, torch.float32)
    assert all(len(group.adapters) == 1 for group in copies.groups)
    assert_alike(step(model, network), expected)


def test_masters_stay_float32_and_get_float32_gradients() -> None:
    model, network = adapted()
    expected = step(model, network)
    join_adapters(model, network, torch.bfloat16)
    actual = step(model, network)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for rounded, exact in zip(actual[2:], expected[2:]):
        assert rounded.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.995


def test_switches_and_detaching_are_seen_by_joint_projections() -> None:
    model, network = adapted()
    streams = tiny.inputs(model.config)
    network.set_multiplier(0.5)
    halved = model(**streams)
    with network.disabled():
        plain = model(**streams)
    join_adapters(model, network, torch.float32)
    torch.testing.assert_close(model(**streams), halved)
    with network.disabled():
        torch.testing.assert_close(model(**streams), plain)
    network.detach()
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(model(**streams), plain)


def test_adapters_that_a_pass_does_not_reach_get_no_gradient() -> None:
    model, network = adapted()
    join_adapters(model, network, torch.float32)
    step(model, network, video=tiny.inputs(model.config)["video"], audio=None)
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == ("audio" in name), name


@pytest.mark.parametrize("keep_transposed", [False, True])
def test_fp8_layers_of_one_input_are_joined(keep_transposed: bool) -> None:
    model, network = adapted()
    form = WeightFormat("fp8", "row", fp8_compute=True, keep_transposed=keep_transposed)
    for layer in (m for m in model.transformer_blocks.modules() if isinstance(m, LoRALinear)):
        layer.base = freeze("", layer.base.weight.data, layer.base.bias.data, form, torch.float32)
    expected = step(model, network)
    join_adapters(model, network, torch.float32)
    to_q = model.transformer_blocks[0].attn1.to_q.base
    assert isinstance(to_q, Fp8Linear)
    assert to_q.codes.untyped_storage().nbytes() == 3 * to_q.codes.numel()
    for name, (actual, wanted) in enumerate(zip(step(model, network), expected)):
        # The joint gradient is quantised with one scale for q, k and v.
        assert torch.nn.functional.cosine_similarity(actual.flatten(), wanted.flatten(), dim=0) > 0.99, name


def test_working_copies_survive_a_second_pass_before_the_first_backward() -> None:
    model, network = adapted()
    copies = join_adapters(model, network, torch.float32)
    assert isinstance(copies, WorkingCopies)
    streams = tiny.inputs(model.config)
    first = sum(v.square().mean() for v in model(**streams))
    second = sum(v.square().mean() for v in model(**streams))
    (first + second).backward()
    doubled = [parameter.grad.clone() for parameter in network.parameters()]
    single = step(model, network)[2:]
    for pair in zip(doubled, single):
        torch.testing.assert_close(pair[0], 2 * pair[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recorded_passes_give_their_gradients_to_other_leaves(compiled: bool, recompute: bool) -> None:
    model, network = adapted()
    expected = step(model, network)[2:]
    copies = join_adapters(model, network, torch.float32)
    model.enable_gradient_checkpointing(recompute)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model.transformer_blocks, backend="aot_eager")
    streams = tiny.inputs(model.config)
    with copies.recorded() as leaves:
        loss = sum(velocity.square().mean() for velocity in model(**streams))
        grads = dict(copies.of_masters(torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert len(grads) == len(expected)
    for parameter, wanted in zip(network.parameters(), expected):
        torch.testing.assert_close(grads[parameter], wanted, rtol=1e-5, atol=1e-5)
    assert_alike(step(model, network)[2:], expected)


class Allocations(TorchDispatchMode):
    """The size of the largest memory that is made within the block, in bytes."""

    largest = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if operation is torch.ops.aten.empty.memory_format:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_masters_of_the_compute_dtype_are_read_where_they_are(masters: torch.dtype) -> None:
    model, network = adapted()
    model.to(torch.bfloat16), network.to(masters)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in network.named_parameters()}
    join_adapters(model, network, torch.bfloat16)
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == {
        name: id(parameter) for name, (parameter, _) in before.items()
    }
    assert all(torch.equal(parameter, value) for parameter, value in before.values())
    with Allocations() as made:
        step(model, network)
    copied = made.largest >= sum(value.numel() for _, value in before.values()) * 2
    assert copied == (masters == torch.float32)
    shared = {adapter.copies[0].data_ptr() == adapter.lora_down.weight.data_ptr() for _, adapter in network.adapters()}
    assert shared == {not copied}


def frozen_weights(model: LTXTransformer) -> dict[str, torch.Tensor]:
    """The innermost weight of every linear layer of the blocks."""
    found = {}
    for name, module in model.transformer_blocks.named_modules():
        if isinstance(module, nn.Linear):
            found[name.replace(".base", "")] = module.weight.detach().clone()
    return found


def test_down_matrices_and_gates_are_rows_of_the_frozen_weights() -> None:
    """Each pass puts the matrices that it trains there; nothing frozen changes."""
    model, network = adapted()
    before, attention = frozen_weights(model), model.transformer_blocks[0].attn1
    copies = join_adapters(model, network, torch.float32)
    for _ in range(2):
        step(model, network)
        for parameter in network.parameters():
            parameter.data.mul_(1.5)  # as an optimizer would
    down = torch.cat([layer.adapter.lora_down.weight for layer in (attention.to_q, attention.to_k, attention.to_v)])
    (group,) = [group for group in copies.groups if group.adapters[0] is attention.to_q.adapter]
    step(model, network)
    assert group.copies.stacked and torch.equal(group.rows, down)
    weights = [attention.to_q.weight, attention.to_gate_logits.weight, group.rows]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    after = frozen_weights(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("streamed", [(), (0, 2)], ids=["resident", "streamed"])
@pytest.mark.parametrize("weights", ["dense", "fp8", "fp8_compute", "nf4"])
def test_quantised_weights_are_expanded_above_the_down_matrices(weights: str, streamed: tuple[int, ...]) -> None:
    model, network = blocks.adapted(weights)
    expected = blocks.gradients(model, network)
    if streamed:
        model.block_runner = BlockStore(model.transformer_blocks, streamed, torch.device("cpu"))
    copies = join_adapters(model, network, torch.float32, streamed=bool(streamed))
    for _ in range(2):
        found = blocks.gradients(model, network, between=True)
        for name, pair in enumerate(zip(found, expected)):
            # A joint gradient in fp8 is quantised with one scale for q, k and v.
            assert torch.nn.functional.cosine_similarity(*(t.flatten() for t in pair), dim=0) > 0.99, name
            if weights != "fp8_compute":
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    groups = [group for group in copies.groups if group.copies.stacked]
    alone = weights == "fp8_compute" or (weights == "dense" and streamed)  # then only gates have them for neighbours
    assert len(groups) == blocks.BLOCKS * (6 if alone else 6 + 6 + 4)


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_joining_anew_leaves_nothing_of_the_first_time(weights: str, masters: torch.dtype) -> None:
    """As a plan that streams more does, in the middle of a run."""
    model, network = blocks.adapted(weights)
    network.to(masters), network.set_compute_dtype(torch.float32)
    expected = blocks.gradients(model, network)
    join_adapters(model, network, torch.float32)
    blocks.gradients(model, network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # what stays of the first time would not follow
    model.block_runner = BlockStore(model.transformer_blocks, (0, 2), torch.device("cpu"))
    copies = join_adapters(model, network, torch.float32, streamed=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.div_(2)
    for pair in zip(blocks.gradients(model, network), expected):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
    if masters == torch.float32:
        settled = [piece.settled for piece in copies.pieces if piece.rows is not None]
        assert settled and all(settled)


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_joining_anew_holds_no_weight_twice(masters: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan of a rehearsal comes when memory is short."""
    model, network = blocks.adapted("dense", dtype=torch.bfloat16)
    network.to(masters)
    join_adapters(model, network, torch.bfloat16)
    expected = blocks.gradients(model, network, "cpu")
    network.zero_grad(set_to_none=True)
    old = StorageWeakRef(model.transformer_blocks[0].attn1.to_q.base.weight.untyped_storage())
    expired = []

    class Noting(joint.JointAttention):
        def __init__(self, *arguments: object, **keywords: object) -> None:
            expired.append(old.expired())
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr(joint, "JointAttention", Noting)
    join_adapters(model, network, torch.bfloat16)
    assert not expired[0] and all(expired[1:])
    for pair in zip(blocks.gradients(model, network, "cpu"), expected):
        assert torch.equal(*pair)


@pytest.mark.parametrize(
    ("weights", "compiled"),
    [("dense", False), ("nf4", False), ("dense", True), pytest.param("nf4", True, marks=pytest.mark.slow)],
)
def test_joining_keeps_no_more_for_the_backward_pass(weights: str, compiled: bool) -> None:
    """Few columns of a wide product must not keep all of it."""
    kept = []
    for joined in (False, True):
        model, network = blocks.adapted(weights)
        if joined:
            join_adapters(model, network, torch.float32)
        if compiled:
            torch._dynamo.reset()
            compile_blocks(model.transformer_blocks, backend="aot_eager_decomp_partition")
        counted = blocks.Kept(model)
        with counted.counting():
            model(**tiny.inputs(model.config))
        kept.append(counted.bytes)
    assert kept[1] <= 1.001 * kept[0], kept


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_pass_without_gradients_leaves_the_rows_to_those_that_need_them(recompute: bool) -> None:
    """A teacher's pass between a student's forward and backward pass must not change the student's gradient."""
    model, network = adapted()
    streams = tiny.inputs(model.config)
    join_adapters(model, network, torch.float32)
    model.enable_gradient_checkpointing(recompute)
    expected = step(model, network)[2:]
    network.zero_grad(set_to_none=True)
    loss = sum(velocity.square().mean() for velocity in model(**streams))
    shadow = Shadows(network, None, 0.5, 1, on_host=False)
    for value in shadow.values.values():
        value.zero_()
    with shadow.in_place(), torch.no_grad():
        model(**streams)
    loss.backward()
    for parameter, wanted in zip(network.parameters(), expected):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6)


def trained(model: LTXTransformer, network: LoRANetwork, steps: int = 3) -> dict[str, torch.Tensor]:
    """The state of a network after some steps, with all that writes into parameters on the way."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    shadow = Shadows(network, None, 0.5, 1, on_host=False)
    for number in range(steps):
        step(model, network)
        optimizer.step()
        network.scale_weight_norms(1.0)
        shadow.after_step()
        if number == 1:
            network.load_state_dict({name: 0.5 * value for name, value in network.state_dict().items()})
    return {**{name: value.clone() for name, value in network.state_dict().items()}, **shadow.state()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_training_on_masters_beside_each_other_gives_the_same(recompute: bool) -> None:
    expected = trained(*adapted())
    model, network = adapted()
    join_adapters(model, network, torch.float32)
    model.enable_gradient_checkpointing(recompute)
    actual = trained(model, network)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(expected[name], value) for name, value in adapted()[1].state_dict().items())


def test_parameters_may_be_elsewhere_for_a_while() -> None:
    """As those of a teacher are, or all of them after a preview that had the model on the host."""
    model, network = adapted()
    streams = tiny.inputs(model.config)
    join_adapters(model, network, torch.float32)
    expected, places = step(model, network), [parameter.data_ptr() for parameter in network.parameters()]
    storages = len({parameter.untyped_storage().data_ptr() for parameter in network.parameters()})
    shadow = Shadows(network, None, 0.5, 1, on_host=False)
    for value in shadow.values.values():
        value.zero_()
    with shadow.in_place(), torch.no_grad():
        taught = model(**streams)
    with network.disabled(), torch.no_grad():
        plain = model(**streams)
    assert all(torch.equal(*pair) for pair in zip(taught, plain))
    assert [parameter.data_ptr() for parameter in network.parameters()] == places
    assert all(torch.equal(*pair) for pair in zip(step(model, network), expected))
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(step(model, network), expected))
    assert len({parameter.untyped_storage().data_ptr() for parameter in network.parameters()}) == storages


@pytest.mark.parametrize("weights", ["fp8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_recomputed_block_expands_each_matrix_once_a_pass(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the forward pass, and once for the second run and the input's gradient together."""
    expanded, results = [], []
    original = expand.expand

    def counted(*arguments: object) -> torch.Tensor:
        expanded.append(arguments[0].shape)
        return original(*arguments)

    monkeypatch.setattr(expand, "expand", counted)
    for compiled in (False, True):
        torch._dynamo.reset()
        model, network = blocks.adapted(weights)
        options = CompileOptions(enabled=compiled, backend="aot_eager_decomp_partition")
        prepare_model(model, MemoryOptions(checkpointing=True), options, torch.device("cpu"))
        join_adapters(model, network, torch.float32)
        expanded.clear()
        results.append(blocks.gradients(model, network))
    matrices = sum(isinstance(layer, QuantisedLinear) for layer in model.transformer_blocks.modules())
    assert len(expanded) == 2 * matrices
    for pair in zip(*results):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
