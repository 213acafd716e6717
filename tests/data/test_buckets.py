from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.data.buckets import bucket_list, bucket_step, reference_size, select_bucket
from ltx2_tuner.errors import UserError

LISTS = {
    (960, 544): "352,1472 384,1344 416,1248 448,1152 480,1088 512,992 544,960 576,896 608,832 640,800 672,768 704,736",
    (768, 512): "288,1344 320,1216 352,1088 384,1024 416,928 448,864 480,800 512,768 544,704 576,672 608,640",
    (512, 512): "256,1024 288,896 320,800 352,736 384,672 416,608 448,576 480,544 512,512",
}


@pytest.mark.parametrize(("resolution", "halves"), LISTS.items())
def test_bucket_lists(resolution, halves):
    half = [tuple(map(int, pair.split(","))) for pair in halves.split()]
    assert list(bucket_list(resolution)) == sorted({size for w, h in half for size in ((w, h), (h, w))})


@pytest.mark.parametrize(
    ("resolution", "source", "expected"),
    [
        ((960, 544), (1920, 1080), (960, 544)),
        ((960, 544), (1080, 1920), (544, 960)),
        ((960, 544), (640, 480), (832, 608)),
        ((960, 544), (720, 720), (704, 736)),
        ((768, 512), (1920, 1080), (800, 480)),
        ((768, 512), (640, 480), (704, 544)),
        ((512, 512), (1280, 720), (672, 384)),
    ],
)
def test_choices(resolution, source, expected):
    assert select_bucket(source, resolution) == expected


def test_without_buckets_the_resolution_is_taken():
    assert select_bucket((123, 4567), (768, 512), enabled=False) == (768, 512)


def test_no_upscale_rounds_a_small_source_down():
    assert select_bucket((500, 300), (960, 544), no_upscale=True) == (480, 288)
    assert select_bucket((1920, 1080), (960, 544), no_upscale=True) == (960, 544)


def test_no_upscale_refuses_less_than_a_cell():
    with pytest.raises(UserError, match="smaller than 32 px"):
        select_bucket((500, 31), (960, 544), no_upscale=True)


def test_too_small_an_area():
    with pytest.raises(UserError, match="too small for bucketing"):
        bucket_list((64, 63))


def test_downscaled_references_enlarge_the_step():
    assert bucket_step(True, 2) == 64
    assert bucket_step(False, 2) == bucket_step(True, 1) == 32
    assert all(side % 64 == 0 for size in bucket_list((768, 512), 64) for side in size)


def test_reference_sizes():
    assert reference_size((768, 512), 1) == (768, 512)
    assert reference_size((768, 512), 2) == (384, 256)
    assert reference_size((96, 64), 4) == (32, 32)


@given(
    resolution=st.tuples(st.integers(64, 1500), st.integers(64, 1500)),
    source=st.tuples(st.integers(64, 5000), st.integers(64, 5000)),
    step=st.sampled_from([32, 64]),
    no_upscale=st.booleans(),
)
def test_buckets_are_whole_cells_of_at_most_the_area(resolution, source, step, no_upscale):
    if resolution[0] * resolution[1] < (2 * step) ** 2:
        return
    width, height = select_bucket(source, resolution, step=step, no_upscale=no_upscale)
    assert width % step == height % step == 0
    assert width > 0 and height > 0
    assert width * height <= resolution[0] * resolution[1]
