"""Checkpointing, split attention and chunked feed-forward change memory, not numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.compilation import compile_blocks
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.attention_backends import attention_function
from ltx2_tuner.models.transformer.model import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from tests.models.transformer import tiny


class WithDropout(nn.Module):
    """A trainable linear with dropout beside a frozen one, as an adapter is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.beside = nn.Linear(base.in_features, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + nn.functional.dropout(self.beside(x), 0.5)


def adapted_model(**changes: object) -> LTXTransformer:
    torch.manual_seed(0)
    model = tiny.model(**changes)
    for block in model.transformer_blocks:
        block.attn1.to_q = WithDropout(block.attn1.to_q)
        block.audio_ff.net[2] = WithDropout(block.audio_ff.net[2])
    return model


def outputs_and_gradients(model: LTXTransformer, device: str = "cpu") -> list[torch.Tensor]:
    """Both velocities and the gradients of everything that trains, and of both latents."""
    streams = {name: tiny.to(modality, device) for name, modality in tiny.inputs(model.config).items()}
    for modality in streams.values():
        modality.latent.requires_grad_()
    torch.manual_seed(7)
    results = model(**streams)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = trained + [modality.latent for modality in streams.values()]
    return [*results, *torch.autograd.grad(sum(result.square().sum() for result in results), targets)]


@pytest.mark.parametrize("blocks", [None, [1]], ids=["all blocks", "one block"])
def test_checkpointing_reproduces_gradients_and_dropout(blocks: list[int] | None) -> None:
    model = adapted_model()
    expected = outputs_and_gradients(model)
    model.enable_gradient_checkpointing(blocks=blocks)
    actual = outputs_and_gradients(model)
    assert len(actual) > 4
    assert all(torch.equal(*pair) for pair in zip(actual, expected))


@pytest.mark.parametrize("outside", [False, True], ids=["inside the block", "around the block"])
@pytest.mark.parametrize("by_parts", [False, True], ids=["blocks", "parts"])
def test_compiled_blocks_recompute_the_same_dropout(by_parts: bool, outside: bool) -> None:
    model = adapted_model()
    expected = outputs_and_gradients(model)
    torch._dynamo.reset()
    if by_parts:
        compile_blocks(model.transformer_blocks, backend="aot_eager")
    else:
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager", dynamic=False)
    if outside:
        model.block_runner = lambda block, index, *arguments: block(*arguments)
    plain = outputs_and_gradients(model)
    model.enable_gradient_checkpointing()
    recomputed = outputs_and_gradients(model)
    assert all(torch.equal(*pair) for pair in zip(recomputed, plain))
    for pair in zip(plain, expected):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_checkpointing_runs_the_chosen_blocks_twice_in_reverse() -> None:
    model = adapted_model()
    run = []

    def runner(block: nn.Module, index: int, *arguments: object) -> tuple:
        run.append(index)
        return block(*arguments)

    model.block_runner = runner
    model.enable_gradient_checkpointing()
    outputs_and_gradients(model)
    assert run == [0, 1, 1, 0]
    run.clear()
    model.enable_gradient_checkpointing(False)
    outputs_and_gradients(model)
    assert run == [0, 1]


def test_the_inputs_of_a_checkpointed_block_can_be_kept_elsewhere() -> None:
    model = adapted_model()
    expected = outputs_and_gradients(model)
    kept, returned = [], []

    @contextlib.contextmanager
    def hooks():
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.shape)
            return tensor.clone()

        def unpack(tensor: torch.Tensor) -> torch.Tensor:
            returned.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    model.enable_gradient_checkpointing(saved_inputs=hooks)
    actual = outputs_and_gradients(model)
    assert all(torch.equal(*pair) for pair in zip(actual, expected))
    streams = tiny.inputs(model.config)
    states = [(*modality.latent.shape[:2], width) for modality, width in zip(streams.values(), (32, 16))]
    for shapes in (kept, returned):  # up to torch 2.11 a checkpoint saves an empty tensor, too
        assert sorted(shape for shape in shapes if shape.numel()) == sorted(states * 2)


@pytest.mark.parametrize("mode", ["batch", "query"])
@pytest.mark.parametrize("target", ATTENTION_TARGETS)
def test_split_attention_gives_the_same(target: str, mode: str) -> None:
    model = adapted_model()
    expected = outputs_and_gradients(model)
    calls = count_attention_calls(model)
    model.split_attention(target, mode, query_chunk=2)
    actual = outputs_and_gradients(model)
    for pair in zip(actual, expected):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    split = {name for name, count in calls.items() if count > 1}
    assert split == set(ATTENTION_TARGETS[target])


def count_attention_calls(model: LTXTransformer) -> dict[str, int]:
    """Kernel calls of each attention of the first block."""
    calls = {}
    block = model.transformer_blocks[0]
    for name in ATTENTION_TARGETS["all"]:
        module, attend = block.get_submodule(name), block.get_submodule(name).attend

        def counted(*arguments: object, name: str = name, attend: object = attend) -> torch.Tensor:
            calls[name] = calls.get(name, 0) + 1
            return attend(*arguments)

        module.attend = counted
    return calls


def test_split_attention_splits_masks_with_their_queries() -> None:
    model = tiny.model()
    streams = tiny.inputs(model.config)
    tokens = streams["video"].latent.shape[1]
    strengths = torch.rand(2, tokens, tokens, generator=torch.Generator().manual_seed(0))
    text = torch.ones(2, tiny.TEXT_TOKENS, dtype=torch.int64)
    text[:, 3:] = 0
    video = dataclasses.replace(streams["video"], attention_mask=strengths, context_mask=text)
    expected = model(video, streams["audio"])
    for mode in ("batch", "query"):
        model.split_attention("all", mode, query_chunk=5)
        for pair in zip(model(video, streams["audio"]), expected):
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", FEED_FORWARD_TARGETS)
def test_a_chunked_feed_forward_gives_the_same(target: str) -> None:
    model = adapted_model()
    for block in model.transformer_blocks:  # dropout masks of chunks are other masks
        block.audio_ff.net[2] = block.audio_ff.net[2].base
    expected = outputs_and_gradients(model)
    rows = {"ff": set(), "audio_ff": set()}
    for name, seen in rows.items():
        projection = model.transformer_blocks[0].get_submodule(name).net[0]
        projection.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.add(arguments[0].shape[1]))
    model.chunk_feed_forward(target, 5)
    actual = outputs_and_gradients(model)
    for pair in zip(actual, expected):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    chunked = FEED_FORWARD_TARGETS[target]
    assert rows["ff"] == ({5, 2} if "ff" in chunked else {12})
    assert rows["audio_ff"] == {5}  # 5 audio tokens are one chunk


def test_a_backend_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="--flash3: the package flash_attn_interface"):
        attention_function("flash3")


def test_masked_calls_of_a_kernel_without_masks_go_to_sdpa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = "from torch.nn.functional import scaled_dot_product_attention as attend\ncalls = []\n"
    source += "def flash_attn_func(q, k, v):\n    calls.append(q.shape)\n"
    source += "    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)\n"
    (tmp_path / "flash_attn.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # restored, that is removed, after the test
    del sys.modules["flash_attn"]
    model = tiny.model()
    streams = tiny.inputs(model.config)
    mask = torch.ones(2, tiny.TEXT_TOKENS, dtype=torch.int64)
    video = dataclasses.replace(streams["video"], context_mask=mask)
    expected = model(video, streams["audio"])
    model.set_attention_backend("flash_attn")
    for pair in zip(model(video, streams["audio"]), expected):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    import flash_attn

    assert len(flash_attn.calls) == 5 * len(model.transformer_blocks)  # all but the masked attention to the text


@pytest.mark.parametrize("count", [2, 3])
def test_compiled_blocks_keep_no_row_for_each_token(count: int) -> None:
    """Where tokens have levels of their own, what the block keeps is what it keeps where they have one."""

    def kept(index: torch.Tensor | None) -> int:
        torch._dynamo.reset()
        model = adapted_model()
        model.blocks_alike = True
        compile_blocks(model.transformer_blocks, backend="aot_eager_decomp_partition")
        streams = tiny.inputs(model.config, per_token=False)
        if index is not None:
            levels = torch.rand(index.shape[0], count)
            streams["video"] = dataclasses.replace(streams["video"], timesteps=levels, timestep_index=index)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: shapes.append(saved.shape) or saved, lambda x: x):
            results = model(**streams)
        assert all(result.requires_grad for result in results)
        return sum(shape == (2, tokens, width) for shape in shapes)

    tokens, width = math.prod(tiny.GRID), tiny.config().video_width
    index = torch.randint(count, (2, tokens))
    head = 1  # the scale of the last norm, once
    assert 0 < kept(None) <= kept(index) <= kept(None) + head
