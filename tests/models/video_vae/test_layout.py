"""Tile layouts: the worked examples of the specification, coverage, and ramps that sum to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ltx2_tuner.models.video_vae.layout import (
    decode_space,
    decode_tile_sizes,
    decode_time,
    encode_space,
    encode_time,
)


def described(tiles) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
    return [
        (
            (tile.source.start, tile.source.stop),
            (tile.target.start, tile.target.stop),
            "".join(str(int(weight)) for weight in tile.weights),
        )
        for tile in tiles
    ]


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (49, 32, 16, [((0, 33), (0, 5), "11111"), ((16, 49), (2, 7), "00111"), ((32, 49), (4, 7), "001")]),
        (
            121,
            64,
            24,
            [((0, 65), (0, 9), "1" * 9), ((40, 105), (5, 14), "000111111"), ((80, 121), (10, 16), "000111")],
        ),
        (17, 32, 16, [((0, 17), (0, 3), "111")]),
    ],
)
def test_temporal_encoding_layout(length, size, overlap, expected) -> None:
    assert described(encode_time(length, size, overlap, 8)) == expected


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (224, 128, 64, [((0, 128), (0, 4), "1110"), ((64, 192), (2, 6), "0110"), ((128, 224), (4, 7), "011")]),
        (544, 512, 64, [((0, 512), (0, 16), "1" * 15 + "0"), ((448, 544), (14, 17), "011")]),
        (224, 160, 96, [((0, 160), (0, 5), "11110"), ((64, 224), (2, 7), "00111")]),
        (128, 64, 32, [((0, 64), (0, 2), "10"), ((32, 96), (1, 3), "10"), ((64, 128), (2, 4), "11")]),
    ],
)
def test_spatial_encoding_layout(length, size, overlap, expected) -> None:
    assert described(encode_space(length, size, overlap, 32)) == expected


def summed(tiles, length: int) -> torch.Tensor:
    total = torch.zeros(length, dtype=torch.float64)
    for tile in tiles:
        assert tile.weights.numel() == tile.target.stop - tile.target.start
        total[tile.target] += tile.weights.double()
    return total


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 19))
def test_spatial_encoding_gives_each_latent_to_one_tile(length, size, overlap) -> None:
    assume(overlap < size)
    total = summed(encode_space(32 * length, 32 * size, 32 * overlap, 32), length)
    assert torch.equal(total, torch.ones(length, dtype=torch.float64))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(3, 20), st.integers(1, 19))
def test_temporal_encoding_covers_each_latent(length, size, overlap) -> None:
    assume(2 * overlap <= size)
    total = summed(encode_time(8 * (length - 1) + 1, 8 * size, 8 * overlap, 8), length)
    assert ((total == 1) | (total == 2)).all()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(2, 20), st.integers(0, 10))
def test_decoding_ramps_sum_to_one(length, size, overlap) -> None:
    assume(2 * overlap <= size)
    space = summed(decode_space(length, size, overlap, 32), 32 * length)
    time = summed(decode_time(length, size, overlap, 8), 8 * (length - 1) + 1)
    torch.testing.assert_close(space, torch.ones_like(space), atol=1e-6, rtol=0)
    torch.testing.assert_close(time, torch.ones_like(time), atol=1e-6, rtol=0)


def test_temporal_decoding_layout() -> None:
    first, second = decode_time(5, 3, 1, 8)
    assert (first.source, first.target) == (slice(0, 3), slice(0, 17))
    assert (second.source, second.target) == (slice(1, 5), slice(8, 33))
    torch.testing.assert_close(first.weights[-8:], torch.arange(8, 0, -1) / 9)
    torch.testing.assert_close(second.weights[:9], torch.arange(0, 9) / 9)
    assert (first.weights[:9] == 1).all() and (second.weights[9:] == 1).all()


@pytest.mark.parametrize(
    ("height", "width", "size", "overlap", "expected"),
    [(16, 16, 8, 2, (8, 8)), (16, 32, 8, 2, (4, 8)), (32, 4, 8, 2, (8, 3)), (4, 40, 8, 0, (2, 8))],
)
def test_decoding_tiles_follow_the_shape_of_the_frame(height, width, size, overlap, expected) -> None:
    assert decode_tile_sizes(height, width, size, overlap) == expected
