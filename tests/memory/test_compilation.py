"""How often blocks are compiled."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch._dynamo.utils import counters

from ltx2_tuner.lora import LoRANetwork
from ltx2_tuner.memory.compilation import PARTS, compile_blocks
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.block import BasicAVTransformerBlock
from ltx2_tuner.training.acceleration import accelerate
from tests.memory.blocks import BLOCKS, adapted, gradients
from tests.models.transformer import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("weights", "streamed"), [("dense", BLOCKS - 2), pytest.param("nf4", 0, marks=pytest.mark.slow)]
)
def test_all_blocks_share_one_compilation_of_each_part(weights: str, streamed: int) -> None:
    model, network = adapted(weights)
    expected = gradients(model, network)
    torch._dynamo.reset()
    counters.clear()
    options = CompileOptions(enabled=True, backend="aot_eager")
    plan = prepare_model(model, MemoryOptions(blocks_to_swap=streamed, checkpointing=True), options, CPU)
    accelerate(model, network, plan, torch.float32)
    for _ in range(2):
        for pair in zip(gradients(model, network), expected):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == len(PARTS)


def shortened(modality: Modality, tokens: int) -> Modality:
    """Its first tokens."""
    shorter = {"latent": modality.latent[:, :tokens].contiguous(), "positions": modality.positions[:, :, :tokens]}
    return dataclasses.replace(modality, **shorter)


def passes(
    model: LTXTransformer, network: LoRANetwork, lengths: Sequence[tuple[int, int]]
) -> Iterator[list[torch.Tensor]]:
    """The gradients of a pass for each number of tokens of picture and sound."""
    given = tiny.inputs(model.config, per_token=False)
    for tokens, of_sound in lengths:
        network.zero_grad(set_to_none=True)
        video, audio = shortened(given["video"], tokens), shortened(given["audio"], of_sound)
        clean = torch.arange(tokens).expand(2, -1) < 2
        levels = torch.stack([video.sigma, torch.zeros(2)], dim=1)
        video = dataclasses.replace(video, timesteps=levels, timestep_index=clean.long())
        sum(velocity.square().mean() for velocity in model(video, audio)).backward()
        yield [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("dynamic", "compilations"), [(False, 3), (None, 2), (True, 1)], ids=["each", "from the second on", "any"]
)
def test_shapes_share_compilations(dynamic: bool | None, compilations: int) -> None:
    lengths = ((12, 5), (9, 4), (7, 3))
    expected = list(passes(*adapted("dense"), lengths))
    model, network = adapted("dense")
    torch._dynamo.reset()
    counters.clear()
    options = CompileOptions(enabled=True, backend="aot_eager", dynamic=dynamic)
    prepare_model(model, MemoryOptions(checkpointing=True), options, CPU)
    for found, wanted in zip(passes(model, network, lengths), expected, strict=True):
        for pair in zip(found, wanted, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == compilations * len(PARTS)


def test_code_for_any_length_is_whole_with_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a long picture's attention to a short sound is split depends on its length; such code is not split."""
    monkeypatch.setattr(tiny, "GRID", (5, 15, 15))
    lengths = ((1120, 5), (1104, 4), (1050, 3))
    expected = list(passes(*adapted("dense", num_layers=1), lengths))
    model, network = adapted("dense", num_layers=1)
    torch._dynamo.reset()
    counters.clear()
    options = CompileOptions(enabled=True, backend="aot_eager", dynamic=True, fullgraph=True)
    prepare_model(model, MemoryOptions(checkpointing=True), options, CPU)
    for found, wanted in zip(passes(model, network, lengths), expected, strict=True):
        for pair in zip(found, wanted, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == len(PARTS)
    with model.attention_backend("sdpa"), torch.no_grad():  # as previews may have it
        model(**tiny.inputs(model.config, per_token=False))


def test_each_part_has_code_of_its_own() -> None:
    """What the compiler learns of the picture's sizes it does not take for changes of the sound's."""
    codes = {getattr(BasicAVTransformerBlock, name).__code__ for name in PARTS}
    assert len(codes) == len(PARTS) and {code.co_name for code in codes} == set(PARTS)


def test_a_user_is_not_reminded_of_what_has_been_checked(caplog: pytest.LogCaptureFixture) -> None:
    model, network = adapted("dense")
    torch._dynamo.reset()
    model.enable_gradient_checkpointing()
    compile_blocks(model.transformer_blocks[:1], backend="aot_eager")
    gradients(model, network)
    assert "context_fn" not in caplog.text


@pytest.mark.parametrize("wanted", [True, False])
def test_the_compiler_is_made_ready_while_files_are_read(wanted: bool) -> None:
    program = (
        "import sys\n"
        "from ltx2_tuner.memory.compilation import compiler_made_ready\n"
        f"with compiler_made_ready({wanted}):\n"
        "    pass\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(wanted)
