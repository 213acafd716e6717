"""How passes are recorded and replayed, with CUDA's part played on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltx2_tuner.lora import LoRANetwork
from ltx2_tuner.lora.joint import join_adapters
from ltx2_tuner.memory import two_streams
from ltx2_tuner.memory.graphs import WARM_UP, TrainingGraphs
from ltx2_tuner.memory.host_memory import HostMemory
from ltx2_tuner.memory.offload import ActivationOffload
from ltx2_tuner.memory.recorder import copy_all
from ltx2_tuner.memory.streaming import BlockStore, streamed_indices
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.model import run_block
from tests.memory import blocks
from tests.memory.paper import Paper
from tests.models.transformer import tiny


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Paper:
    return Paper(monkeypatch)


def recorder(streams: int = 2, streamed: int = 0) -> tuple[LTXTransformer, LoRANetwork, TrainingGraphs]:
    model, network = blocks.adapted("dense")
    if streamed:
        indices = streamed_indices(blocks.BLOCKS, streamed)
        model.block_runner = BlockStore(model.transformer_blocks, indices, torch.device("cpu"))
        model.block_runner._copies = torch.cuda.Stream()
    copies = join_adapters(model, network, torch.float32, streamed=bool(streamed))
    return model, network, TrainingGraphs(model, list(network.parameters()), lambda: None, copies, streams)


def offload(monkeypatch: pytest.MonkeyPatch) -> ActivationOffload:
    """As it is on CUDA, but for the page locks."""
    made = ActivationOffload(torch.device("cpu"))
    made._copies = torch.cuda.Stream()
    monkeypatch.setattr(HostMemory, "locked", True)
    return made


def warm_up(model: LTXTransformer, network: LoRANetwork) -> None:
    for seed in range(WARM_UP):
        blocks.gradients(model, network, seed=seed)


@pytest.mark.parametrize("how", ["kept", "recomputed", "offloaded"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("streamed", [0, 1, blocks.BLOCKS - 1])
def test_recorded_passes_give_what_unrecorded_ones_give(
    paper: Paper, monkeypatch: pytest.MonkeyPatch, streamed: int, streams: int, how: str
) -> None:
    model, network = blocks.adapted("dense")
    expected = {
        (seed, passes): blocks.gradients(model, network, seed=seed, passes=passes)
        for seed in (7, 8)
        for passes in (1, 3)
    }
    model, network, graphs = recorder(streams, streamed)
    saved = {"saved_inputs": offload(monkeypatch)} if how == "offloaded" else {}
    model.enable_gradient_checkpointing(how != "kept", **saved)
    warm_up(model, network)
    for (seed, passes), wanted in expected.items():
        for pair in zip(blocks.gradients(model, network, seed=seed, passes=passes), wanted):
            torch.testing.assert_close(*pair)
        with torch.no_grad():  # leaves other blocks in the ring
            model(**tiny.inputs(model.config))
    (recording,) = graphs.recordings.values()
    assert paper.launched[-2:] == [recording.forward.graph, recording.backward.graph]
    assert recording.forward.after == recording.backward.before


def test_autograd_adds_nothing_to_a_gradient_that_is_lent() -> None:
    """What it adds into it hands on, and the memory is kept only until the streams meet."""
    kept, picture = {0: []}, torch.ones(8, requires_grad=True)
    own = 3 * picture
    theirs = 2 * two_streams._Lent.apply(picture, kept, 0)  # the later one: its gradient comes first
    (own + theirs).sum().backward()
    assert picture.grad.tolist() == [5.0] * 8
    assert all(tensor.tolist() == [2.0] * 8 for tensor in kept[0])


def test_what_a_recorded_pass_offloads_is_its_own(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network = blocks.adapted("dense")
    expected = blocks.gradients(model, network, seed=7)
    model, network, graphs = recorder()
    made = offload(monkeypatch)
    model.enable_gradient_checkpointing(saved_inputs=made)
    warm_up(model, network)
    blocks.gradients(model, network, seed=8)
    network.zero_grad(set_to_none=True)
    outputs = model(**tiny.inputs(model.config, seed=7))
    assert paper.launched[-1] is next(iter(graphs.recordings.values())).forward.graph
    other = model(**tiny.inputs(model.config, seed=9))  # not recorded: the first pass is under way
    sum(output.square().mean() for output in outputs).backward()
    found = [*outputs, *(parameter.grad for parameter in network.parameters())]
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair)
    del other
    assert len(made._recorded) == 2 * blocks.BLOCKS == len(made._free)
    graphs.release()
    assert not made._recorded and len(made._free) == 4 * blocks.BLOCKS
    for pair in zip([*blocks.gradients(model, network, seed=7)], expected):
        torch.testing.assert_close(*pair)
    assert len(graphs.recordings) == 1 and len(made._recorded) == 2 * blocks.BLOCKS == len(made._free)


def test_a_state_is_sent_once_whatever_is_asked_for(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network = blocks.adapted("dense")
    made = offload(monkeypatch)
    model.enable_gradient_checkpointing(saved_inputs=made)
    sent, send = [], made._send
    monkeypatch.setattr(made, "_send", lambda parked: sent.append(parked) or send(parked))
    for stream in range(2):
        sent.clear()
        model(**tiny.inputs(model.config))[stream].square().mean().backward()
        assert 0 < len(sent) == len(set(sent)) <= 2 * blocks.BLOCKS
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_what_was_sent_ahead_for_nobody_ends_with_its_recording(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass goes no further than what is trained."""
    made, main = offload(monkeypatch), torch.cuda.Stream()
    x = torch.randn(64, requires_grad=True)

    def two_values() -> list[Tensor]:
        with made():
            return [x.sin(), x.cos()]

    def capture() -> torch.cuda.graph:
        return torch.cuda.graph(torch.cuda.CUDAGraph(), pool=object(), stream=main)

    two_values()  # leaves memory for the recording
    with torch.cuda.stream(main), capture(), made.recording(main):
        _, last = two_values()
    with torch.cuda.stream(main), capture(), made.recording(main):
        (gradient,) = torch.autograd.grad(last.sum(), x)
    torch.testing.assert_close(gradient, -x.detach().sin())


def test_states_are_on_their_way_before_their_block_is_reached(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network = blocks.adapted("dense")
    made = offload(monkeypatch)
    model.enable_gradient_checkpointing(saved_inputs=made)
    log, send = [], made._send

    def noting_send(parked: object) -> object:
        log.append("send")
        return send(parked)

    def noting(name: str, part: object) -> object:
        def run(*arguments: object, **keywords: object) -> Tensor:
            log.append(name)
            return part(*arguments, **keywords)

        return run

    monkeypatch.setattr(made, "_send", noting_send)
    for index, block in enumerate(model.transformer_blocks):
        for name in ("open_video", "open_audio"):
            monkeypatch.setattr(block, name, noting(f"{name[5:]} {index}", getattr(block, name)))
    outputs = model(**tiny.inputs(model.config))
    log.clear()
    sum(output.square().mean() for output in outputs).backward()
    assert log.count("send") == 2 * blocks.BLOCKS and log[:2] == ["send", "send"]
    sent = [log[: place + 1].count("send") for place, entry in enumerate(log) if entry != "send"]
    assert sent == [2, *(min(count + 3, 2 * blocks.BLOCKS) for count in range(1, 2 * blocks.BLOCKS))]  # of either kind
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_gradients_are_kept_before_their_memory_is_overwritten(paper: Paper) -> None:
    model, network, graphs = recorder()
    single = blocks.gradients(model, network, seed=7)[2:]
    warm_up(model, network)
    (recording,) = graphs.recordings.values()
    overwrite = torch.ops.aten.fill_.Scalar  # as activations do on the device
    recording.forward.graph.calls[:0] = [
        (overwrite, (grad, torch.nan), {}, grad) for grad in graphs.recorder.grads.values()
    ]
    for actual, wanted in zip(blocks.gradients(model, network, seed=7, passes=3)[2:], single):
        torch.testing.assert_close(actual, 3 * wanted)


@pytest.mark.parametrize("failure", ["memory", "error", "invalid"])
@pytest.mark.parametrize(("place", "block"), [("open_audio", 0), ("close_video", 2)])
@pytest.mark.parametrize("streamed", [0, blocks.BLOCKS - 1])
def test_a_capture_that_fails_leaves_a_model_that_trains(
    paper: Paper, caplog: pytest.LogCaptureFixture, failure: str, place: str, block: int, streamed: int
) -> None:
    caplog.set_level("INFO")
    model, network = blocks.adapted("dense")
    expected = blocks.gradients(model, network, seed=7)
    model, network, graphs = recorder(streamed=streamed)
    part = getattr(model.transformer_blocks[block], place)
    captures = []

    def failing(*arguments: object, **keywords: object) -> Tensor:
        if paper.graph is not None:
            captures.append(paper.graph)
            if failure == "invalid":
                torch.cuda.synchronize()
            raise (torch.OutOfMemoryError if failure == "memory" else RuntimeError)("no more of it")
        return part(*arguments, **keywords)

    setattr(model.transformer_blocks[block], place, failing)
    warm_up(model, network)
    for _ in range(2):
        for pair in zip(blocks.gradients(model, network, seed=7), expected):
            torch.testing.assert_close(*pair)
    why = "synchronised within a capture" if failure == "invalid" else "no more of it"
    assert why in caplog.messages[-1]  # though the capture, cut short, reports another error at its end
    assert len(captures) == 2 and not graphs.recordings and not paper.launched  # on two streams, then on one
    assert paper.graph is None and paper.current is paper.default
    assert model.block_runner is graphs.recorder.runner and not graphs.recorder.two_streams.kept
    assert bool(graphs.refused) == (failure == "memory") == graphs.works
    if streamed:
        assert graphs.recorder.store.run is run_block and graphs.recorder.store._computing() == (paper.default,)


@pytest.mark.parametrize("failure", ["memory", "error", "invalid"])
@pytest.mark.parametrize("streamed", [0, blocks.BLOCKS - 1])
def test_what_cannot_be_recorded_on_two_streams_is_on_one(paper: Paper, failure: str, streamed: int) -> None:
    model, network = blocks.adapted("dense")
    expected = blocks.gradients(model, network, seed=7)
    model, network, graphs = recorder(streamed=streamed)
    part = model.transformer_blocks[1].close_audio

    def failing(*arguments: object, **keywords: object) -> Tensor:
        if paper.graph is None or paper.current is paper.origin:
            return part(*arguments, **keywords)
        if failure == "invalid":
            torch.cuda.synchronize()
        raise (torch.OutOfMemoryError if failure == "memory" else RuntimeError)("no more of it")

    model.transformer_blocks[1].close_audio = failing
    warm_up(model, network)
    for _ in range(2):
        for pair in zip(blocks.gradients(model, network, seed=7), expected):
            torch.testing.assert_close(*pair)
    (recording,) = graphs.recordings.values()
    assert paper.launched[-2:] == [recording.forward.graph, recording.backward.graph]
    assert not graphs.refused and model.block_runner is graphs.recorder.runner


@pytest.mark.parametrize("memory", [False, True], ids=["whole", "cut short"])
@pytest.mark.parametrize("capture", [0, 1])
def test_captures_that_cannot_end_leave_a_model_that_trains(
    paper: Paper, monkeypatch: pytest.MonkeyPatch, capture: int, memory: bool
) -> None:
    """Where memory had run out before, another plan may have more."""
    model, network, graphs = recorder()
    expected = blocks.gradients(model, network, seed=7)
    make, made = torch.cuda.CUDAGraph, []

    def unending() -> object:
        graph = make()
        made.append(graph)
        if len(made) % (capture + 1) == 0:
            end = graph.capture_end

            def fail() -> None:
                paper.invalid = True
                end()

            def run_out(*_: object) -> None:
                raise torch.OutOfMemoryError("no more of it")

            graph.capture_end = fail
            if memory:
                monkeypatch.setattr(type(graph), "__torch_dispatch__", run_out)
        return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", unending)
    warm_up(model, network)
    for pair in zip(blocks.gradients(model, network, seed=7), expected):
        torch.testing.assert_close(*pair)
    assert not graphs.recorder.grads and not graphs.recordings
    assert bool(graphs.refused) == memory == graphs.works
    assert paper.graph is None and paper.current is paper.default and model.block_runner is run_block
    assert not (paper.allocating or paper.held or paper.generator.capturing), (
        "torch would take the capture to be under way"
    )


class Copies(TorchDispatchMode):
    """Notes which tensors are copied in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        if func is torch.ops.aten._foreach_copy_.default:
            self.calls.append((list(args[0]), list(args[1])))
        return func(*args, **(kwargs or {}))


def test_tensors_of_a_dtype_are_copied_together() -> None:
    shapes, dtypes = ((2, 3), (0, 4), (5,)), (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    sources = [torch.randn(shape).mul(4).to(dtype) for shape in shapes for dtype in dtypes]
    sources += [torch.randn(3, 2).T, torch.randn(4, 1).expand(4, 6)]
    targets = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
    with Copies() as copies:
        copy_all(targets, sources)
    assert all(torch.equal(*pair) for pair in zip(targets, sources))
    assert len(copies.calls) == len(dtypes) + 1
    for call in copies.calls:
        assert len({tensor.dtype for tensor in call[0] + call[1]}) == 1
        assert len({target.stride() == source.stride() for target, source in zip(*call)}) == 1
