"""Merging: exact sums, projections, dtypes and metadata."""

from __future__ import annotations

import json

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.deltas import WeightDeltas
from ltx2_tuner.lora.formats import LoRAFile, LoRAMatrices
from ltx2_tuner.lora.merging import (
    OrthogonalOptions,
    merge_concat,
    merge_orthogonal,
    merged_metadata,
    output_dtype,
)

A, B, C = (f"transformer_blocks.{i}.attn1.to_q" for i in range(3))


def make(
    seed: int, ranks: dict[str, int], alpha: float = 3.0, size=(12, 20), dtype=torch.float32, **metadata
) -> LoRAFile:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoRAMatrices(
            torch.randn(rank, size[1], generator=generator).to(dtype),
            torch.randn(size[0], rank, generator=generator).to(dtype),
            alpha,
        )
        for path, rank in ranks.items()
    }
    return LoRAFile(f"folder/lora{seed}.safetensors", "original", modules, metadata=metadata)


def total(loras, multipliers, path):
    return sum(m * lora.modules[path].delta() for lora, m in zip(loras, multipliers) if path in lora.modules)


def test_concat_is_the_weighted_sum_with_any_ranks_and_overlap():
    loras = [make(1, {A: 3, B: 2}), make(2, {A: 5}, alpha=7.0), make(3, {C: 1, A: 2})]
    multipliers = [1.0, -0.5, 2.0]
    merged = merge_concat(loras, multipliers)
    assert {path: module.rank for path, module in merged.items()} == {A: 10, B: 2, C: 1}
    for path, module in merged.items():
        assert module.scale == 1.0
        torch.testing.assert_close(module.delta(), total(loras, multipliers, path), rtol=1e-5, atol=1e-4)


def orthogonal(loras, multipliers=(1.0, 1.0), **options):
    return merge_orthogonal(loras, multipliers, OrthogonalOptions(**options))


def test_fraction_zero_is_the_plain_sum():
    loras = [make(1, {A: 3, B: 2}), make(2, {A: 5, C: 1})]
    merged = orthogonal(loras, (0.7, -1.3), fraction=0.0)
    for path, module in merged.items():
        torch.testing.assert_close(module.delta(), total(loras, (0.7, -1.3), path), rtol=1e-4, atol=1e-4)
    assert merged[A].rank == 8


def test_identical_inputs_and_fraction_one_leave_nothing():
    lora = make(1, {A: 4})
    merged = orthogonal([lora, lora], fraction=1.0)
    assert merged[A].delta().abs().max() < 1e-5 * lora.modules[A].delta().abs().max()


def test_projection_follows_the_definition_with_dense_matrices():
    loras = [make(1, {A: 4}), make(2, {A: 3})]
    multipliers, fraction = (1.5, 0.5), 0.5
    dense = [m * lora.modules[A].delta().double() for lora, m in zip(loras, multipliers)]
    expected = torch.zeros_like(dense[0])
    for own, other in ((0, 1), (1, 0)):
        _, values, right = torch.linalg.svd(dense[other])
        count = int((values > 1e-6 * values[0]).sum())
        top = right[: round(fraction * count)].T
        expected += dense[own] - dense[own] @ top @ top.T
    merged = orthogonal(loras, multipliers, fraction=fraction)
    torch.testing.assert_close(merged[A].delta().double(), expected, rtol=1e-4, atol=1e-4)


def test_swapping_the_inputs_changes_nothing():
    loras = [make(1, {A: 4, B: 2}), make(2, {A: 3, B: 6})]
    for mode in ("sum", "max", "min"):
        there = orthogonal(loras, (1.0, 0.5), rank_mode=mode)
        back = orthogonal(loras[::-1], (0.5, 1.0), rank_mode=mode)
        for path in there:
            torch.testing.assert_close(there[path].delta(), back[path].delta(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "rank"), [("sum", 7), ("max", 4), ("min", 3)])
def test_rank_modes_keep_the_leading_directions(mode, rank):
    loras = [make(1, {A: 4}), make(2, {A: 3})]
    whole, cut = orthogonal(loras)[A].delta(), orthogonal(loras, rank_mode=mode)[A]
    assert cut.rank == rank
    left, values, right = torch.linalg.svd(whole)
    best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    torch.testing.assert_close(cut.delta(), best, rtol=1e-3, atol=1e-3)


def test_ranks_are_clipped_to_the_layer():
    loras = [make(1, {A: 9}), make(2, {A: 8})]
    assert orthogonal(loras)[A].rank == 12


def test_a_zero_lora_projects_nothing_out():
    zero = make(1, {A: 4})
    zero.modules[A].up.zero_()
    other = make(2, {A: 3})
    torch.testing.assert_close(
        orthogonal([zero, other], fraction=1.0)[A].delta(), other.modules[A].delta(), rtol=1e-4, atol=1e-4
    )


def test_refusals():
    with pytest.raises(UserError, match="exactly 2 files, not 3"):
        orthogonal([make(1, {A: 1})] * 3)
    for merge in (lambda loras: merge_concat(loras, (1, 1)), orthogonal):
        with pytest.raises(UserError, match="of size 8x20 and 12x20"):
            merge([make(1, {A: 1}), make(2, {A: 1}, size=(8, 20))])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float64, torch.bfloat16), torch.float32),
    ],
)
def test_output_dtype(dtypes, expected):
    assert output_dtype([make(i, {A: 1}, dtype=dtype) for i, dtype in enumerate(dtypes)]) == expected


def test_metadata_keeps_what_all_agree_on():
    common = {
        "ss_base_model_version": "ltx2_v1",
        "ss_network_dim": "2",
        "sshs_model_hash": "x",
        "reference_downscale_factor": "2",
    }
    loras = [
        make(1, {A: 2}, ss_seed="1", ss_ltx_version="2.0", **common),
        make(2, {A: 2}, ss_seed="2", ss_ltx_version="2.3", **common),
    ]
    metadata, warnings = merged_metadata(loras, [1.0, 0.5], merge_concat(loras, [1.0, 0.5]), {"merge_method": "concat"})
    assert metadata == {
        "ss_base_model_version": "ltx2_v1",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "reference_downscale_factor": "2",
        "merge_method": "concat",
        "merge_sources": '["lora1.safetensors", "lora2.safetensors"]',
        "merge_multipliers": "[1.0, 0.5]",
    }
    assert len(warnings) == 1 and "ss_ltx_version" in warnings[0]


def test_a_reference_factor_on_one_side_only_is_warned_about():
    loras = [make(1, {A: 2}, ss_reference_downscale_factor="2"), make(2, {B: 1})]
    metadata, warnings = merged_metadata(loras, [1.0, 1.0], merge_concat(loras, [1.0, 1.0]), {})
    assert "ss_reference_downscale_factor" not in metadata and metadata["ss_network_dim"] == "Dynamic"
    assert len(warnings) == 1 and json.loads(metadata["merge_sources"])[0] == "lora1.safetensors"


def test_weight_deltas_add_in_float32_and_leave_the_rest():
    loras = [make(1, {A: 2}), make(2, {A: 3, B: 1})]
    deltas = WeightDeltas([(loras[0], 0.5), (loras[1], -1.0)])
    weight = torch.randn(12, 20).bfloat16()
    expected = (weight.float() + 0.5 * loras[0].modules[A].delta() - loras[1].modules[A].delta()).bfloat16()
    torch.testing.assert_close(deltas(f"{A}.weight", weight), expected, rtol=1e-2, atol=1e-2)
    assert deltas(f"{C}.weight", weight) is weight
    deltas.check_used()


def test_weight_deltas_that_do_not_fit():
    deltas = WeightDeltas([(make(1, {A: 2}), 1.0)])
    with pytest.raises(UserError, match="none of its modules"):
        deltas.check_used()
    with pytest.raises(UserError, match="12x20, the model's is 3x4"):
        deltas(f"{A}.weight", torch.zeros(3, 4))
