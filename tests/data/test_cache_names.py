from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.data import cache_names

STEMS = st.text(st.characters(blacklist_characters="/\\\0", blacklist_categories=("Cs",)), min_size=1, max_size=30)


def test_the_documented_examples():
    assert cache_names.latent_name("000001", 1024, 576) == "000001_1024x0576_ltx2.safetensors"
    assert (
        cache_names.latent_name(cache_names.video_key("clip", 0, 33), 768, 512)
        == "clip_00000-033_0768x0512_ltx2.safetensors"
    )
    assert cache_names.text_name("clip") == "clip_ltx2_te.safetensors"


@pytest.mark.parametrize("stem", ["a_b", "a.b", "a b", "größe", "a_00000-017", "_", "x_0768x0512", "clip_ltx2"])
@pytest.mark.parametrize("window", [None, (0, 17), (123456, 1025)])
def test_names_parse_back(stem, window):
    key = stem if window is None else cache_names.video_key(stem, *window)
    parsed = cache_names.parse_latent_name(cache_names.latent_name(key, 768, 12345), video=window is not None)
    assert (parsed.stem, parsed.key, parsed.width, parsed.height) == (stem, key, 768, 12345)
    assert (parsed.start, parsed.frames) == (window or (None, None))


@given(stem=STEMS, start=st.integers(0, 10**7), frames=st.integers(1, 10**4), side=st.integers(1, 10**5))
def test_any_stem_parses_back(stem, start, frames, side):
    name = cache_names.latent_name(cache_names.video_key(stem, start, frames), side, side)
    parsed = cache_names.parse_latent_name(name, video=True)
    assert (parsed.stem, parsed.start, parsed.frames, parsed.width) == (stem, start, frames, side)
    assert cache_names.parse_text_name(cache_names.text_name(stem)) == stem


@pytest.mark.parametrize(
    "name",
    [
        "clip_ltx2_te.safetensors",
        "clip_0768x0512_ltx2_audio.safetensors",
        "clip_0768x0512_ltx2_dino.safetensors",
        "clip_0768x0512_ltx2.safetensors",  # no window: not an item of a video dataset
        "clip_00000-033_0768x0512_LTX2.safetensors",
    ],
)
def test_other_files_are_no_video_items(name):
    assert cache_names.parse_latent_name(name, video=True) is None


def test_siblings_of_a_latent():
    latent = Path("cache") / "a_0001x0002_ltx2.safetensors"
    assert cache_names.audio_path(latent).name == "a_0001x0002_ltx2_audio.safetensors"
    assert cache_names.dino_path(latent).name == "a_0001x0002_ltx2_dino.safetensors"
    assert cache_names.simple_audio_path(latent, "a").name == "a_ltx2_audio.safetensors"


def test_a_lone_text_suffix_is_no_text_file():
    assert cache_names.parse_text_name("_ltx2_te.safetensors") is None
