from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from ltx2_tuner.models.transformer.block import SCALE_SELF, SHIFT_SELF
from ltx2_tuner.models.transformer.modulation import Modulation, modulate, norm_modulate
from tests.models.transformer import tiny

EPS = 1e-6
LEVELS = {
    "one level": (1, None),
    "one level by index": (1, True),
    "a level per token": (7, None),
    "two levels by index": (2, True),
    "three levels by index": (3, True),
    "many levels by index": (6, True),
}


def random_modulation(kind: str, dtype: torch.dtype = torch.float64) -> Modulation:
    count, by_index = LEVELS[kind]
    index = torch.randint(count, (2, 7)) if by_index else None
    return Modulation(torch.randn(2, 5, dtype=dtype), torch.randn(2, count, 2, 5, dtype=dtype), index)


@pytest.mark.parametrize("kind", LEVELS)
def test_the_gradient_is_that_of_the_plain_expression(kind: str) -> None:
    torch.manual_seed(0)
    modulation = random_modulation(kind, torch.float32)
    x = torch.randn(2, 7, 5, requires_grad=True)
    weights = torch.randn(2, 7, 5)

    def plain(x: torch.Tensor) -> torch.Tensor:
        rows = modulation.table + modulation.levels
        if modulation.index is not None:
            rows = torch.stack([rows[sample, modulation.index[sample]] for sample in range(2)])
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + rows[:, :, 1]) + rows[:, :, 0]

    actual, expected = norm_modulate(x, modulation, 1, 0, EPS), plain(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), x), torch.autograd.grad((expected * weights).sum(), x)
    )
    compiled = torch.compile(norm_modulate, backend="aot_eager", dynamic=False)(x, modulation, 1, 0, EPS)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_train_get_gradients() -> None:
    modulation = random_modulation("one level", torch.float32)
    modulation.levels.requires_grad_()
    norm_modulate(torch.randn(2, 7, 5), modulation, 1, 0, EPS).sum().backward()
    assert modulation.levels.grad.abs().sum() > 0


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    modulation = Modulation(torch.randn(2, 64), torch.randn(2, 1, 2, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_modulate(x, modulation, 1, 0, EPS)
    assert sum(tensor.numel() > 2 * 64 for tensor in kept) == 1


def large_scale_modulation(width: int) -> Modulation:
    """bf16 rows whose scale is so large that every rounding in between shows."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, width, generator=generator) * 300
    levels = torch.randn(1, 1, 2, width, generator=generator) * 300
    return Modulation(table.bfloat16(), levels.bfloat16())


def bfloat16_steps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance in units of the last place of bfloat16 at the expected value."""
    step = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=1e-3)))) * 2**-7
    return ((actual.double() - expected).abs() / step).max().item()


def test_adaptive_norms_of_large_bfloat16_scales_round_once() -> None:
    modulation = large_scale_modulation(256)
    x = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = modulation.table.double() + modulation.levels.double()[:, :, :]
    normed = F.rms_norm(x.double(), (256,), eps=EPS)
    expected = normed * (1 + rows[:, :, 1]) + rows[:, :, 0]
    assert bfloat16_steps(norm_modulate(x, modulation, 1, 0, EPS), expected) < 0.51

    low_rows = modulation.table + modulation.levels
    low = F.rms_norm(x, (256,), eps=EPS) * (1 + low_rows[:, :, 1]) + low_rows[:, :, 0]
    assert bfloat16_steps(low, expected) > 2, "the case must be able to tell float32 from bfloat16"

    expected = x.double() * (1 + rows[:, :, 1]) + rows[:, :, 0]
    assert bfloat16_steps(modulate(x, modulation, 1, 0), expected) < 0.51


@torch.no_grad()
def test_a_bfloat16_model_modulates_in_float32() -> None:
    model = tiny.model("2.3").bfloat16()
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name:
            parameter.mul_(300)
    streams = tiny.inputs(model.config, per_token=False)
    seen, last = {}, {}
    block = model.transformer_blocks[0]
    for name, module in (("first", block.attn1), ("context", block.attn2), ("head", model.proj_out)):
        module.register_forward_pre_hook(lambda _, arguments, name=name: seen.__setitem__(name, arguments))
    model.block_outputs = lambda index, video, audio: last.update(video=video)
    model(**streams)

    embedded = model.patchify_proj(streams["video"].latent.bfloat16())
    timesteps = streams["video"].timesteps * 1000
    levels, embedding = model.adaln_single(timesteps)
    rows = block.scale_shift_table.double() + levels.double()
    expected = F.rms_norm(embedded.double(), embedded.shape[-1:], eps=EPS)
    expected = expected * (1 + rows[:, :, SCALE_SELF]) + rows[:, :, SHIFT_SELF]
    assert bfloat16_steps(seen["first"][0], expected) < 0.51

    prompt = block.prompt_scale_shift_table.double() + model.prompt_adaln_single(timesteps)[0].double()
    expected = streams["video"].context.bfloat16().double() * (1 + prompt[:, :, 1]) + prompt[:, :, 0]
    assert bfloat16_steps(seen["context"][1], expected) < 0.51

    head = model.scale_shift_table.double() + embedding.double().unsqueeze(-2)
    normed = F.layer_norm(last["video"].double(), last["video"].shape[-1:], eps=EPS)
    expected = normed * (1 + head[:, :, 1]) + head[:, :, 0]
    assert bfloat16_steps(seen["head"][0], expected) < 0.52


def test_levels_by_index_are_levels_per_token() -> None:
    model = tiny.model("2.3")
    streams = tiny.inputs(model.config)
    by_index = {}
    for stream, modality in streams.items():
        levels = torch.stack([torch.zeros_like(modality.sigma), modality.sigma], dim=1)
        index = (modality.timesteps > 0).long()
        by_index[stream] = dataclasses.replace(modality, timesteps=levels, timestep_index=index)
    for actual, expected in zip(model(**by_index), model(**streams)):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
