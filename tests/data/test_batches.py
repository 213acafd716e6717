from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest
import torch

from ltx2_tuner.data import cache_files, cache_names
from ltx2_tuner.data.batches import BatchOptions, TrainingData, ValidationData
from ltx2_tuner.errors import UserError
from tests.data.caches import (
    config_for,
    filled,
    video_config,
    write_audio_item,
    write_text_item,
    write_video_item,
)


def names(loader) -> list[list[str]]:
    return [batch["item_keys"] for batch in loader]


def test_a_batch(tmp_path):
    for stem in ("a", "b"):
        write_video_item(tmp_path / "cache", stem, frames=17)
    config = video_config(tmp_path, extra="batch_size = 2\nvideo_loss_weight = 0.5\ntarget_fps = 24")
    batch = TrainingData(config, seed=0)[0, 0]
    assert batch["latents"]["latents"].shape == (2, 4, 3, 2, 3)
    assert batch["latents"]["latents"].dtype == torch.bfloat16
    for name, value in {"num_frames": 3, "height": 2, "width": 3}.items():
        assert batch["latents"][name].tolist() == [value, value]
        assert batch["latents"][name].dtype == torch.int32
    assert batch["latents"]["fps"].tolist() == [24.0, 24.0]
    conditions = batch["conditions"]
    assert conditions["video_prompt_embeds"].shape == (2, 5, 6)
    assert conditions["audio_prompt_embeds"].shape == (2, 5, 3)
    assert conditions["prompt_attention_mask"].shape == (2, 5)
    assert "dino_features" not in conditions
    assert "audio_latents" not in batch and batch["audio_lengths"].tolist() == [0, 0]
    assert (batch["video_loss_weight"], "audio_loss_weight" in batch) == (0.5, False)
    assert batch["timesteps"] is None
    assert batch["captions"] == ["about a", "about b"]
    assert batch["item_keys"] == ["a_00000-017", "b_00000-017"]


def test_sound_is_padded_with_zeros_and_missing_sound_has_length_zero(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a", audio_steps=3)
    write_video_item(cache, "b", audio_steps=5)
    write_video_item(cache, "c")
    data = TrainingData(video_config(tmp_path, "av", "batch_size = 3"), seed=0)
    batch = data[0, 0]
    latents = batch["audio_latents"]["latents"]
    assert latents.shape == (3, 8, 5, 16)
    assert batch["audio_lengths"].tolist() == [3, 5, 0]
    assert batch["audio_lengths"].dtype == torch.int32
    assert bool((latents[0, :, :3] == 0.5).all()) and not latents[0, :, 3:].any() and not latents[2].any()
    assert data.has_audio(0, 0)


def test_stored_lengths_count(tmp_path):
    path = write_video_item(tmp_path / "cache", "a", audio_steps=5)
    cache_files.write_audio(cache_names.audio_path(path), filled(8, 5, 16), {}, length=4)
    assert TrainingData(video_config(tmp_path, "av"), seed=0)[0, 0]["audio_lengths"].tolist() == [4]


def test_joined_embeddings_of_old_caches_never_meet(tmp_path):
    """The classic failure: the joined copies differ in width, the real tensors do not."""
    cache = tmp_path / "cache"
    for stem, audio in (("a", filled(5, 3)), ("b", None)):
        write_video_item(cache, stem, text=False)
        mask = torch.ones(5)
        cache_files.write_text(cache / cache_names.text_name(stem), filled(5, 6), audio, mask, {}, legacy_keys=True)
    conditions = TrainingData(video_config(tmp_path, extra="batch_size = 2"), seed=0)[0, 0]["conditions"]
    assert set(conditions) == {"video_prompt_embeds", "prompt_attention_mask"}


@pytest.mark.parametrize(("strategy", "shape", "lengths"), [("pad", 70, [60, 70]), ("truncate", 50, [50, 50])])
def test_sound_datasets(tmp_path, strategy, shape, lengths):
    write_audio_item(tmp_path / "cache", "a", 60)
    write_audio_item(tmp_path / "cache", "b", 70)
    (tmp_path / "sounds").mkdir()
    body = (
        f"[[datasets]]\naudio_directory = '{tmp_path}/sounds'\ncache_directory = '{tmp_path}/cache'\n"
        f"batch_size = 2\naudio_bucket_strategy = '{strategy}'\n"
    )
    batch = TrainingData(config_for(tmp_path, body, "audio"), seed=0)[0, 0]
    assert batch["audio_latents"]["latents"].shape == (2, 8, shape, 16)
    assert batch["audio_lengths"].tolist() == lengths
    assert batch["latents"]["latents"].shape == (2, 4, 1, 1, 1)
    assert batch["latents"]["num_frames"].tolist() == [3, 3]
    assert batch["latents"]["height"].tolist() == [2, 2]
    assert batch["latents"]["fps"].tolist() == [25.0, 25.0]


def test_references(tmp_path):
    cache, references = tmp_path / "cache", tmp_path / "rc"
    for stem, steps in (("a", 4), ("b", 6)):
        path = write_video_item(cache, stem, audio_steps=9)
        cache_files.write_latents(references / path.name, filled(4, 1, 2, 3), {})
        cache_files.write_audio(cache_names.audio_path(references / path.name), filled(8, steps, 16), {})
    extra = f"batch_size = 2\nreference_cache_directory = '{references}'\n"
    config = video_config(tmp_path, "av", extra + f"reference_audio_cache_directory = '{references}'")
    batch = TrainingData(config, seed=0)[0, 0]
    assert batch["ref_latents"]["latents"].shape == (2, 4, 1, 2, 3)
    assert batch["ref_latents"]["num_frames"].tolist() == [1, 1]
    assert batch["ref_audio_latents"]["latents"].shape == (2, 8, 6, 16)
    assert batch["ref_audio_lengths"].tolist() == [4, 6]
    without = TrainingData(config, seed=0, options=BatchOptions(references=False, reference_audio=False))[0, 0]
    assert not [name for name in without if name.startswith("ref_")]


def test_features_are_padded_on_the_frame_axis(tmp_path):
    from safetensors.torch import save_file

    for stem, frames in (("a", 17), ("b", 16)):
        path = write_video_item(tmp_path / "cache", stem)
        save_file({"dino_features": torch.ones(frames, 4, 2).half()}, cache_names.dino_path(path))
    config = video_config(tmp_path, extra="batch_size = 2")
    features = TrainingData(config, 0, BatchOptions(dino=True))[0, 0]["conditions"]["dino_features"]
    assert features.shape == (2, 17, 4, 2)
    assert not features[1, 16].any() and features[1, 15].all()


def test_files_that_do_not_fit_together_are_both_named(tmp_path):
    cache = tmp_path / "cache"
    for stem, length in (("a", 5), ("b", 7)):
        write_video_item(cache, stem, text=False)
        path = cache / cache_names.text_name(stem)
        cache_files.write_text(path, filled(length, 6), None, torch.ones(length), {})
    data = TrainingData(video_config(tmp_path, extra="batch_size = 2"), seed=0)
    with pytest.raises(UserError, match=r"a_ltx2_te\.safetensors \[5, 6\] and b_ltx2_te\.safetensors \[7, 6\]"):
        data[0, 0]


def test_sound_of_other_shapes_names_both_files(tmp_path):
    cache = tmp_path / "cache"
    write_video_item(cache, "a", audio_steps=5)
    path = write_video_item(cache, "b", audio_steps=5)
    cache_files.write_audio(cache_names.audio_path(path), filled(8, 5, 12), {})
    data = TrainingData(video_config(tmp_path, "av", "batch_size = 2"), seed=0)
    with pytest.raises(UserError, match=r"a_.*_audio.* and b_.*_audio.* differ in channels or mel bins"):
        data[0, 0]


def many(
    tmp_path, count: int = 7, mode: str = "video", extra: str = "batch_size = 2\nnum_repeats = 2", sound=lambda n: None
):
    for number in range(count):
        write_video_item(tmp_path / "cache", f"c{number}", size=(32, 32), frames=1, audio_steps=sound(number))
    return video_config(tmp_path, mode, extra)


def test_epochs_are_a_function_of_seed_and_epoch(tmp_path):
    config = many(tmp_path)
    data, again = TrainingData(config, seed=3), TrainingData(config, seed=3)
    loader, other = data.loader(), again.loader()
    assert len(loader) == len(data) == 7
    for epoch in (2, 1, 3):
        loader.set_epoch(epoch)
        other.set_epoch(epoch)
        assert names(loader) == names(other)
    loader.set_epoch(1)
    first = names(loader)
    assert sorted(key for batch in first for key in batch) == sorted([f"c{n}_00000-001" for n in range(7)] * 2)
    loader.set_epoch(2)
    assert names(loader) != first
    different = TrainingData(config, seed=4).loader()
    different.set_epoch(1)
    assert names(different) != first


def test_workers_and_resume_see_the_same_order(tmp_path):
    data = TrainingData(many(tmp_path), 3, BatchOptions(timestep_buckets=3))
    plain, spawned = data.loader(), data.loader(workers=2, persistent_workers=True)
    for epoch in (1, 2):
        plain.set_epoch(epoch)
        spawned.set_epoch(epoch)
        expected = [(batch["item_keys"], batch["timesteps"]) for batch in plain]
        assert [(batch["item_keys"], batch["timesteps"]) for batch in spawned] == expected
        resumed = data.loader()
        resumed.set_epoch(epoch, skip=3)
        assert [(batch["item_keys"], batch["timesteps"]) for batch in resumed] == expected[3:]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_pass_that_was_started_early_is_the_pass(tmp_path, persistent):
    data = TrainingData(many(tmp_path, extra=""), seed=3)
    plain = data.loader()
    loader = data.loader(workers=1, persistent_workers=persistent)
    for epoch, skip in ((1, 2), (2, 0)):
        plain.set_epoch(epoch, skip)
        expected = names(plain)
        loader.set_epoch(epoch, skip)
        loader.start()
        assert multiprocessing.active_children()
        assert names(loader) == expected
    loader.start()
    loader.set_epoch(1, skip=2)  # another one after all
    plain.set_epoch(1, skip=2)
    assert names(loader) == names(plain)


def test_no_more_processes_than_batches(tmp_path):
    data = TrainingData(many(tmp_path, extra=""), seed=3)
    loader = data.loader(workers=8, world_size=4)
    before = len(multiprocessing.active_children())
    loader.start()
    assert len(multiprocessing.active_children()) - before == min(2, os.cpu_count())  # 7 batches over 4 ranks


def test_skipped_batches_are_not_read(tmp_path):
    data = TrainingData(many(tmp_path, extra=""), seed=3)
    skipped = data.batch_items(1, data.order(1)[0])[0]
    skipped.latent_path.unlink()
    loader = data.loader()
    loader.set_epoch(1, skip=1)
    assert len(names(loader)) == 6


def test_ranks_share_an_epoch(tmp_path):
    data = TrainingData(many(tmp_path, extra=""), seed=3)
    whole = data.loader()
    whole.set_epoch(1)
    parts = []
    for rank in range(2):
        loader = data.loader(rank=rank, world_size=2)
        loader.set_epoch(1)
        assert len(loader) == 4
        parts.append(names(loader))
    assert [name for pair in zip(*parts) for name in pair][:7] == names(whole)


def test_timesteps_come_in_batch_sizes(tmp_path):
    data = TrainingData(many(tmp_path), 3, BatchOptions(timestep_buckets=2))
    batches = [data[1, number] for number in range(len(data))]
    draws = [value for batch in batches for value in batch["timesteps"]]
    assert [len(batch["timesteps"]) for batch in batches] == [len(batch["item_keys"]) for batch in batches]
    assert sum(value < 0.5 for value in draws) == 7


def test_audio_quota_and_probability(tmp_path):
    config = many(tmp_path, 12, "av", "", sound=lambda number: 2 if number < 3 else None)
    quota = TrainingData(config, 3, BatchOptions(audio_quota=1, accumulation=4))
    heard = [quota.has_audio(1, number) for number in quota.order(1)]
    assert [sum(heard[start : start + 4]) for start in (0, 4, 8)] == [1, 1, 1]
    eager = TrainingData(config, 3, BatchOptions(audio_probability=1.0))
    assert [eager.has_audio(1, number) for number in eager.order(1)] == [True] * 3 + [False] * 9


def test_audio_order_without_sound_is_an_error(tmp_path):
    config = many(tmp_path)
    with pytest.raises(UserError, match="need clips with sound"):
        TrainingData(config, 3, BatchOptions(audio_probability=0.5))


def test_several_datasets_keep_their_own_options(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video_item(tmp_path / "one", "a")
    write_video_item(tmp_path / "two", "b")
    entry = f"[[datasets]]\nvideo_directory = '{tmp_path}/videos'\n"
    body = f"{entry}cache_directory = '{tmp_path}/one'\n{entry}cache_directory = '{tmp_path}/two'\nnum_repeats = 3\n"
    data = TrainingData(config_for(tmp_path, body), seed=1)
    keys = [data[1, number]["item_keys"][0][0] for number in data.order(1)]
    assert sorted(keys) == ["a", "b", "b", "b"]
    assert [item.stem for item in data.items] == ["a", "b"]


def test_what_goes_to_workers_is_small(tmp_path):
    data = TrainingData(many(tmp_path), seed=3)
    assert pickle.loads(pickle.dumps(data)).inventories == []
    assert data.inventories


# Validation


def validation_config(tmp_path, extra=""):
    (tmp_path / "videos").mkdir(exist_ok=True)
    write_video_item(tmp_path / "cache", "t")
    for stem in ("b", "a"):
        write_video_item(tmp_path / "val", stem)
    body = f"[[datasets]]\nvideo_directory = '{tmp_path}/videos'\ncache_directory = '{tmp_path}/cache'\n"
    body += f"[[validation_datasets]]\nvideo_directory = '{tmp_path}/videos'\ncache_directory = '{tmp_path}/val'\n"
    return config_for(tmp_path, body + extra)


def test_validation_is_ordered_and_never_repeated(tmp_path):
    data = ValidationData(validation_config(tmp_path, "batch_size = 4\nnum_repeats = 3\nvideo_loss_weight = 2\n"))
    batches = list(data)
    assert [batch["item_keys"] for batch in batches] == [["a_00000-017"], ["b_00000-017"]]
    assert batches[0]["video_loss_weight"] == 2.0
    assert len(data) == 2


def test_validation_needs_datasets_and_items(tmp_path):
    with pytest.raises(UserError, match=r"no \[\[validation_datasets\]\] entry"):
        ValidationData(video_config(tmp_path))
    config = validation_config(tmp_path)
    for path in (tmp_path / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no usable items in validation_datasets\[0\]"):
        ValidationData(config)


def test_text_of_another_stem_is_not_taken(tmp_path):
    write_video_item(tmp_path / "cache", "a", text=False)
    write_text_item(tmp_path / "cache", "a_00000-017")
    with pytest.raises(UserError, match="no usable items"):
        TrainingData(video_config(tmp_path), seed=0)


def test_the_share_of_sound_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    config = many(tmp_path, 10, "av", "", sound=lambda number: 2 if number < 2 else None)
    TrainingData(config, seed=0)
    assert "sound is trained in 2 of 10 batches of an epoch (20 %)" in caplog.text
    assert "num_repeats times 2 on the datasets with sound gives 33 %" in caplog.text
