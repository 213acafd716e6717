from __future__ import annotations

import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from ltx2_tuner.data import cache_files, cache_names
from ltx2_tuner.data.inventory import check_inventories, count_table, quantized_steps, take_inventory
from ltx2_tuner.errors import UserError
from tests.data.caches import config_for, filled, video_dataset, write_audio_item, write_text_item, write_video_item


def test_usable_items_are_listed_by_name(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "b_1.x", audio_steps=20)
    write_video_item(cache, "a", start=17, frames=33, size=(64, 96))
    found = take_inventory(video_dataset(tmp_path, "av"), "av")
    first, second = found.items
    assert (first.key, first.stem, first.frames, first.size) == ("a_00017-033", "a", 33, (64, 96))
    assert first.bucket_key == (64, 96, 33)
    assert (first.audio_path, first.audio_steps) == (None, None)
    assert (second.stem, second.audio_steps) == ("b_1.x", 20)
    assert found.without_sound == ["a_00017-033"]


def test_video_mode_leaves_sound_alone(tmp_path):
    write_video_item(tmp_path / "cache", "a", audio_steps=20)
    assert take_inventory(video_dataset(tmp_path), "video").items[0].audio_path is None


def test_one_text_serves_all_windows_of_a_clip(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a")
    write_video_item(cache, "a", start=17, text=False)
    assert len(take_inventory(video_dataset(tmp_path), "video").items) == 2


def test_items_without_text_are_skipped(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a")
    write_video_item(cache, "b", text=False)
    found = take_inventory(video_dataset(tmp_path), "video")
    assert [item.stem for item in found.items] == ["a"]
    assert found.skipped == {"no_text": ["b_00000-017"]}


def test_foreign_and_damaged_latents_are_never_trained_on(tmp_path, caplog):
    cache = tmp_path / "cache"
    write_video_item(cache, "good")
    damaged = write_video_item(cache, "damaged")
    damaged.write_bytes(damaged.read_bytes()[:50])
    save_file({"latents_1x1x1_float32": torch.zeros(4, 1, 1, 1)}, cache / "other_00000-001_0032x0032_ltx2.safetensors")
    (cache / "no_window_0032x0032_ltx2.safetensors").write_bytes(b"")
    found = take_inventory(video_dataset(tmp_path), "video")
    assert [item.stem for item in found.items] == ["good"]
    assert len(found.skipped["foreign"]) == 2
    assert "damaged_00000-017" in caplog.text and "not named like items" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_out_of_the_cache_are_not_followed(tmp_path, caplog):
    cache = tmp_path / "cache"
    write_video_item(cache, "good")
    outside = write_video_item(tmp_path / "elsewhere", "secret")
    (cache / outside.name).symlink_to(outside)
    write_text_item(cache, "secret")
    assert [item.stem for item in take_inventory(video_dataset(tmp_path), "video").items] == ["good"]
    assert "a link that leaves the cache directory" in caplog.text


@pytest.mark.parametrize("name", ["a_ltx2_te.safetensors", "a_00000-017_0096x0064_ltx2_audio.safetensors"])
def test_damaged_companions_are_an_error_that_names_them(tmp_path, name):
    cache = tmp_path / "cache"
    write_video_item(cache, "a", audio_steps=20)
    (cache / name).write_bytes((cache / name).read_bytes()[:-1])
    with pytest.raises(UserError, match=name):
        take_inventory(video_dataset(tmp_path, "av"), "av")


def test_the_simplified_sound_name_is_read_where_it_is_unambiguous(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a")
    cache_files.write_audio(cache / "a_ltx2_audio.safetensors", filled(8, 7, 16), {})
    dataset = video_dataset(tmp_path, "av")
    assert take_inventory(dataset, "av").items[0].audio_steps == 7
    write_video_item(cache, "a", start=17)
    assert not any(item.has_audio for item in take_inventory(dataset, "av").items)


def test_image_datasets(tmp_path):
    (tmp_path / "pics").mkdir()
    cache = tmp_path / "cache"
    path = cache / cache_names.latent_name("x_00000-017", 640, 480)
    cache_files.write_latents(path, filled(4, 1, 17, 22), {})
    write_text_item(cache, "x_00000-017")
    body = f"[[datasets]]\nimage_directory = '{tmp_path}/pics'\ncache_directory = '{cache}'\n"
    item = take_inventory(config_for(tmp_path, body).datasets[0], "video").items[0]
    assert (item.key, item.frames, item.size, item.bucket_key) == ("x_00000-017", 1, (640, 480), (704, 544))


def test_references_are_required_where_they_are_configured(tmp_path):
    cache, references = tmp_path / "cache", tmp_path / "rc"
    for stem in ("a", "b"):
        path = write_video_item(cache, stem)
    cache_files.write_latents(references / path.name, filled(4, 1, 2, 3), {})
    dataset = video_dataset(tmp_path, extra=f"reference_cache_directory = '{references}'")
    found = take_inventory(dataset, "video")
    assert [item.stem for item in found.items] == ["b"]
    assert found.skipped == {"no_reference": ["a_00000-017"]}
    assert found.items[0].bucket_key == (96, 64, 17, 1, 2, 3)
    unused = take_inventory(dataset, "video", references=False)
    assert [item.reference_path for item in unused.items] == [None, None]


def test_sound_is_part_of_the_key_when_asked_for(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a", audio_steps=20)
    write_video_item(cache, "b")
    dataset = video_dataset(tmp_path, "av", extra="separate_audio_buckets = true")
    assert [item.bucket_key for item in take_inventory(dataset, "av").items] == [(96, 64, 1, 17), (96, 64, 0, 17)]


@pytest.mark.parametrize(
    ("steps", "strategy", "interval", "expected"),
    [
        (20, "pad", 2.0, 50),
        (74, "pad", 2.0, 50),
        (75, "pad", 2.0, 100),
        (126, "pad", 2.0, 150),
        (126, "truncate", 2.0, 100),
        (49, "truncate", 2.0, 49),
        (7, "pad", 0.001, 7),
    ],
)
def test_quantized_lengths(steps, strategy, interval, expected):
    assert quantized_steps(steps, strategy, interval) == expected


def audio_config(tmp_path, extra=""):
    (tmp_path / "sounds").mkdir(exist_ok=True)
    body = f"[[datasets]]\naudio_directory = '{tmp_path}/sounds'\ncache_directory = '{tmp_path}/cache'\n{extra}\n"
    return config_for(tmp_path, body, "audio")


def test_sound_datasets(tmp_path):
    write_audio_item(tmp_path / "cache", "a", 60, frames=33)
    cache_files.write_latents(tmp_path / "cache" / cache_names.latent_name("b", 960, 544), filled(4, 1, 1, 1), {})
    cache_files.write_latents(tmp_path / "cache" / cache_names.latent_name("c", 960, 544), filled(4, 1, 1, 1), {})
    write_text_item(tmp_path / "cache", "c")
    found = take_inventory(audio_config(tmp_path).datasets[0], "audio")
    assert [(item.key, item.frames, item.bucket_key) for item in found.items] == [("a", 33, (960, 544, 50))]
    assert found.skipped == {"no_text": ["b"], "no_audio": ["c"]}


def test_the_count_table(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a", audio_steps=20)
    write_video_item(cache, "b", text=False)
    found = take_inventory(video_dataset(tmp_path, "av"), "av")
    assert count_table([found]) == [
        "[datasets[0]] latents 2 | audio 1 | text 1 | references 0 | reference audio 0 | dino 0 | usable 1",
        "[total] latents 2 | audio 1 | text 1 | references 0 | reference audio 0 | dino 0 | usable 1",
    ]


def test_gaps_and_silence_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache = tmp_path / "cache"
    write_video_item(cache, "a", audio_steps=20)
    write_video_item(cache, "b")
    write_video_item(cache, "c", text=False)
    write_text_item(cache, "lonely")
    check_inventories([take_inventory(video_dataset(tmp_path, "av", "batch_size = 2"), "av")], "av")
    assert "datasets[0]: 1 text caches have no latent" in caplog.text
    assert "2 of 3 latents are usable: no_text 1 (c_00000-017)" in caplog.text
    assert "sound: 1 of 2 clips (1 have no sound cache)" in caplog.text
    assert "separate_audio_buckets = true keeps them apart" in caplog.text


def test_no_usable_item_names_both_scripts(tmp_path):
    write_video_item(tmp_path / "cache", "a", text=False)
    with pytest.raises(UserError, match=r"ltx2_cache_latents\.py and ltx2_cache_text_encoder_outputs\.py"):
        check_inventories([take_inventory(video_dataset(tmp_path), "video")], "video")


def test_an_empty_or_missing_cache(tmp_path):
    with pytest.raises(UserError, match=r"no usable items in datasets\[0\]"):
        check_inventories([take_inventory(video_dataset(tmp_path), "video")], "video")


def test_no_sound_at_all_in_av_mode(tmp_path):
    write_video_item(tmp_path / "cache", "a")
    with pytest.raises(UserError, match=r"not one \*_ltx2_audio\.safetensors .* --ltx2_mode av"):
        check_inventories([take_inventory(video_dataset(tmp_path, "av"), "av")], "av")
