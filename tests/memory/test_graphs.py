"""Recorded passes give the gradients that the same passes give unrecorded."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from ltx2_tuner.lora import LoRANetwork, Targets, select_layers
from ltx2_tuner.memory import recorder
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model
from ltx2_tuner.memory.recorder import copy_all
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.tokens import video_positions
from ltx2_tuner.training.acceleration import accelerate
from tests.memory import blocks
from tests.models.transformer import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def adapted() -> tuple[LTXTransformer, LoRANetwork]:
    model = tiny.model().cuda()
    network = LoRANetwork(select_layers(model, Targets("av", "t2v")), 4)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    network.cuda().attach(model)
    return model.train(), network.train()


def gradients(model: LTXTransformer, network: LoRANetwork, streams: dict, passes: int = 1) -> list[torch.Tensor]:
    network.zero_grad(set_to_none=True)
    for _ in range(passes):
        velocities = model(streams.get("video"), streams.get("audio"))
        sum(velocity.square().mean() for velocity in velocities if velocity is not None).backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("streams", [("video", "audio"), ("video",)], ids=["av", "video"])
def test_recorded_passes_give_the_same_gradients(recompute: bool, streams: tuple[str, ...]) -> None:
    model, network = adapted()
    batches = [
        {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config, seed=seed).items()}
        for seed in (1, 2)
    ]
    batches = [{name: batch[name] for name in streams} for batch in batches]
    expected = [gradients(model, network, batch) for batch in batches]
    plan = prepare_model(model, MemoryOptions(checkpointing=recompute), CompileOptions(), torch.device("cuda"))
    graphs = accelerate(model, network, plan, torch.float32)
    for _ in range(3):
        gradients(model, network, batches[0])
    assert len(graphs.recordings) == 1
    for batch, wanted in zip(batches, expected):
        for passes in (1, 2):
            for actual, single in zip(gradients(model, network, batch, passes), wanted):
                assert (actual is None) == (single is None)
                if single is not None:
                    torch.testing.assert_close(actual, passes * single, rtol=1e-3, atol=1e-4)


def test_a_second_forward_before_the_first_backward_is_not_replayed() -> None:
    model, network = adapted()
    streams = {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config).items()}
    plan = prepare_model(model, MemoryOptions(), CompileOptions(), torch.device("cuda"))
    accelerate(model, network, plan, torch.float32)
    single = [gradients(model, network, streams) for _ in range(4)][-1]
    network.zero_grad(set_to_none=True)
    losses = [sum(velocity.square().mean() for velocity in model(**streams)) for _ in range(2)]
    sum(losses).backward()
    for parameter, wanted in zip(network.parameters(), single):
        torch.testing.assert_close(parameter.grad, 2 * wanted, rtol=1e-3, atol=1e-4)


def frozen(
    weights: str,
    count: int,
    *,
    recompute: bool,
    offload: bool = False,
    graphs: bool,
    masters: torch.dtype = torch.float32,
) -> tuple[LTXTransformer, LoRANetwork, object]:
    """A compiled model with `count` streamed blocks, and its recorder."""
    model, network = blocks.adapted(weights, "cuda", torch.bfloat16)
    network.to(masters)
    options = MemoryOptions(blocks_to_swap=count, checkpointing=recompute, checkpoint_offload=offload)
    # What is recorded is the question here, not the kernels.
    compilation = CompileOptions(enabled=True, backend="aot_eager")
    plan = prepare_model(model, options, compilation, torch.device("cuda"))
    return model, network, accelerate(model, network, plan, torch.bfloat16, graphs=graphs)


@pytest.mark.parametrize("how", ["kept", "recomputed", "offloaded"])
@pytest.mark.parametrize("weights", ["dense", "fp8", "nf4"])
def test_streamed_passes_are_recorded_with_their_copies(weights: str, how: str) -> None:
    memory = {"recompute": how != "kept", "offload": how == "offloaded"}
    for count in (1, blocks.BLOCKS - 1):
        model, network, _ = frozen(weights, count, **memory, graphs=False)
        expected = [blocks.gradients(model, network, "cuda") for _ in range(2)][-1]
        model, network, graphs = frozen(weights, count, **memory, graphs=True)
        for number in range(8):
            found = blocks.gradients(model, network, "cuda")
            for actual, wanted in zip(found, expected):
                error = (actual.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
                assert error < 1e-2, (count, number)
            if number % 3 == 2:  # other passes leave other blocks in the ring
                streams = {name: tiny.to(value, "cuda") for name, value in tiny.inputs(model.config).items()}
                with torch.no_grad():
                    model(**streams)
        assert len(graphs.recordings) == 1


def test_gradients_handed_from_stream_to_stream_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd has the allocator keep them until a recording ends: a hidden state of the picture for each block."""
    layers, tokens, lost = 8, 4 * 32 * 32, []
    model = tiny.model(num_layers=layers).cuda()
    network = LoRANetwork(select_layers(model, Targets("av", "t2v")), 4).cuda().train()
    network.attach(model.train())
    streams = tiny.inputs(model.config, per_token=False)
    long = {"latent": torch.randn(2, tokens, 8), "positions": video_positions(4, 32, 32, 25.0, batch=2)}
    streams["video"] = dataclasses.replace(streams["video"], **long)
    streams = {name: tiny.to(modality, "cuda") for name, modality in streams.items()}
    compilation = CompileOptions(enabled=True, backend="aot_eager")
    plan = prepare_model(model, MemoryOptions(checkpointing=True), compilation, torch.device("cuda"))
    graphs = accelerate(model, network, plan, torch.float32)

    def watch(*arguments: object) -> None:
        if torch.cuda.is_current_stream_capturing():  # what nobody holds and nobody is given, near the end
            stats = torch.cuda.memory_stats()
            lost.append(stats["active_bytes.all.current"] - stats["allocated_bytes.all.current"])
        copy_all(*arguments)

    monkeypatch.setattr(recorder, "copy_all", watch)
    for _ in range(3):
        gradients(model, network, streams)
    assert len(graphs.recordings) == 1 and len(lost) == 1
    assert lost[0] < 2 * tokens * model.config.video_width * 4


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_replayed_passes_read_what_the_optimizer_wrote(masters: torch.dtype) -> None:
    runs = []
    for record in (False, True):
        model, network, graphs = frozen("dense", 1, recompute=True, graphs=record, masters=masters)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
        velocities = []
        for _ in range(6):
            velocities.append([output.float() for output in blocks.gradients(model, network, "cuda")[:2]])
            optimizer.step()
        runs.append(velocities)
    assert len(graphs.recordings) == 1
    for first, expected, found in zip(runs[0][0], runs[0][-1], runs[1][-1]):
        assert (expected - first).norm() > 0.15 * first.norm()
        assert (found - expected).norm() < 0.05 * first.norm()


def test_released_recordings_are_made_again() -> None:
    model, network = adapted()
    streams = {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config).items()}
    plan = prepare_model(model, MemoryOptions(), CompileOptions(), torch.device("cuda"))
    graphs = accelerate(model, network, plan, torch.float32)
    before = [gradients(model, network, streams) for _ in range(4)][-1]
    assert len(graphs.recordings) == 1
    graphs.release()
    assert not graphs.recordings
    for pair in zip(gradients(model, network, streams), before):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    assert len(graphs.recordings) == 1


def test_removed_recordings_leave_nothing_on_the_device() -> None:
    """Nor what cuBLAS keeps for their streams: rehearsals record one plan after the other."""
    model, network = adapted()
    streams = {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config).items()}
    plan = prepare_model(model, MemoryOptions(), CompileOptions(), torch.device("cuda"))
    left = []
    for _ in range(3):
        graphs = accelerate(model, network, plan, torch.float32)
        for _ in range(4):
            gradients(model, network, streams)
        assert len(graphs.recordings) == 1
        network.zero_grad(set_to_none=True)
        graphs.remove()
        del graphs
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[2] - left[0] < 2**20


@pytest.mark.parametrize("failure", ["memory", "error", "invalid"])
def test_a_capture_that_fails_leaves_a_model_that_trains(failure: str) -> None:
    model, network = adapted()
    batches = [
        {name: tiny.to(modality, "cuda") for name, modality in tiny.inputs(model.config, batch=size).items()}
        for size in (2, 1)
    ]
    expected = [gradients(model, network, batch) for batch in batches]
    plan = prepare_model(model, MemoryOptions(), CompileOptions(), torch.device("cuda"))
    graphs = accelerate(model, network, plan, torch.float32)
    broken = model.transformer_blocks[1]
    part = broken.close_video

    def failing(*arguments: object, **keywords: object) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            if failure == "memory":
                raise torch.OutOfMemoryError("no more of it")
            if failure == "invalid":
                torch.cuda.synchronize()  # ends all capturing
            raise RuntimeError("cannot be recorded")
        return part(*arguments, **keywords)

    broken.close_video = failing
    for _ in range(5):
        check(gradients(model, network, batches[0]), expected[0])
    assert not graphs.recordings and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert bool(graphs.refused) == (failure == "memory") == graphs.works
    broken.close_video = part
    for _ in range(4):
        check(gradients(model, network, batches[1]), expected[1])
    assert len(graphs.recordings) == (failure == "memory")
    assert torch.rand(8, device="cuda").sum() > 0, "a capture under way would have its generator refuse"
    assert watched_memory() <= 64 << 20


def watched_memory() -> int:
    """Bytes reserved for what two streams use one time after the other: of one time, unless a capture is under way."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, side = torch.cuda.memory_reserved(), torch.cuda.Stream()
    for _ in range(5):
        shared = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(side):
            shared.add_(1)
        shared.record_stream(side)
        del shared
        torch.cuda.synchronize()
    return torch.cuda.memory_reserved() - before


def check(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
