from __future__ import annotations

import pytest
import torch

from ltx2_tuner.data import cache_files, cache_names
from ltx2_tuner.data.fingerprints import ExpectedCaches, check_caches
from ltx2_tuner.data.inventory import Inventory, take_inventory
from ltx2_tuner.data.metadata import canonical_json
from ltx2_tuner.errors import UserError
from tests.data.caches import CHANNELS, filled, video_dataset, write_audio_item, write_text_item, write_video_item

IDS = {"video_encoder": "v" * 16, "audio_encoder": "a" * 16, "text": "t" * 16, "gemma": "g" * 16}


def expected(mode: str = "av", **changes) -> ExpectedCaches:
    values = {"mode": mode, **IDS, "video_width": 6, "audio_width": 3, "latent_channels": CHANNELS}
    return ExpectedCaches(**(values | changes))


def inventory(tmp_path, mode: str = "av", *, latent=None, audio=None, text=None) -> Inventory:
    """One clip with the metadata given for its three files."""
    cache = tmp_path / "cache"
    path = write_video_item(cache, "a", audio_steps=4, text=False, metadata=latent or {})
    cache_files.write_audio(cache_names.audio_path(path), filled(8, 4, 16), audio or {})
    write_text_item(cache, "a", **(text or {}))
    return take_inventory(video_dataset(tmp_path, mode), mode)


FITTING = {
    "latent": {"component_id": "v" * 16, "preprocess": canonical_json({"ltx_mode": "av", "vae_dtype": "bfloat16"})},
    "audio": {"component_id": "a" * 16},
    "text": {"component_id": "t" * 16, "gemma_id": "g" * 16, "ltx_mode": "av"},
}


def changed(part: str, **values: str) -> dict:
    return FITTING | {part: FITTING[part] | values}


def test_caches_that_fit(tmp_path, caplog):
    check_caches([inventory(tmp_path, **FITTING)], expected())
    assert not caplog.records


def test_caches_without_fingerprints_are_accepted_with_one_warning(tmp_path, caplog):
    check_caches([inventory(tmp_path)], expected())
    assert [record.message for record in caplog.records] == [
        "datasets[0]: 3 cache files carry no fingerprint (made by another tool); taken as fitting"
    ]


@pytest.mark.parametrize(
    ("part", "values", "reason", "file", "script"),
    [
        ("latent", {"component_id": "x"}, "made with another checkpoint", "_ltx2.safetensors", "ltx2_cache_latents.py"),
        ("audio", {"component_id": "x"}, "made with another checkpoint", "_audio.safetensors", "ltx2_cache_latents.py"),
        ("text", {"component_id": "x"}, "made with another checkpoint", "_te.safetensors", "text_encoder_outputs.py"),
        ("text", {"gemma_id": "x"}, "made with another Gemma", "_te.safetensors", "text_encoder_outputs.py"),
        ("text", {"ltx_mode": "video"}, "made with --ltx2_mode video", "_te.safetensors", "text_encoder_outputs.py"),
        (
            "latent",
            {"preprocess": canonical_json({"ltx_mode": "audio"})},
            "made with --ltx2_mode audio",
            "_ltx2.safetensors",
            "ltx2_cache_latents.py",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_command(tmp_path, caplog, part, values, reason, file, script):
    found = [inventory(tmp_path, **changed(part, **values))]
    with pytest.raises(UserError) as caught:
        check_caches(found, expected())
    message = str(caught.value)
    assert message.startswith("1 cache files do not fit this run")
    assert all(words in message for words in (reason, file, f"{script} --ltx2_mode av", "--cache_check_mode"))
    check_caches(found, expected(), "warn")
    assert reason in caplog.text
    caplog.clear()
    check_caches(found, expected(), "off")
    assert not caplog.records


def test_av_caches_serve_video_training(tmp_path, caplog):
    check_caches([inventory(tmp_path, "video", **FITTING)], expected("video"))
    assert not caplog.records


def test_what_this_run_does_not_know_is_not_compared(tmp_path):
    check_caches([inventory(tmp_path, **changed("text", gemma_id="x"))], expected(gemma=None))


def test_settings_that_training_knows_are_compared(tmp_path):
    with pytest.raises(UserError, match="made with vae_dtype bfloat16, this run has float32"):
        check_caches([inventory(tmp_path, **FITTING)], expected(preprocess={"vae_dtype": "float32", "unknown": 1}))


@pytest.mark.parametrize("policy", ["error", "warn", "off"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_width": 7}, "video text embeddings are 6 wide, the model takes 7"),
        ({"audio_width": 7}, "audio text embeddings are 3 wide, the model takes 7"),
        ({"latent_channels": 128}, f"latents have {CHANNELS} channels, the model takes 128"),
    ],
)
def test_tensors_the_model_cannot_take_are_always_refused(tmp_path, changes, message, policy):
    with pytest.raises(UserError, match=message):
        check_caches([inventory(tmp_path, **FITTING)], expected(**changes), policy)


def test_video_text_caches_are_refused_in_av_mode(tmp_path):
    found = inventory(tmp_path)
    write_text_item(tmp_path / "cache", "a", audio=False)
    found = take_inventory(found.dataset, "av")
    with pytest.raises(UserError, match=r"no audio text embeddings.*text_encoder_outputs\.py --ltx2_mode av"):
        check_caches([found], expected(), "off")
    check_caches([take_inventory(found.dataset, "video")], expected("video"))


@pytest.mark.parametrize(
    ("width", "mode", "fits"), [(9, "av", True), (6, "video", True), (6, "av", False), (9, "video", True)]
)
def test_joined_embeddings_of_old_caches(tmp_path, width, mode, fits):
    from safetensors.torch import save_file

    found = inventory(tmp_path, mode)
    path = tmp_path / "cache" / "a_ltx2_te.safetensors"
    save_file({"text_bfloat16": filled(5, width), "text_mask": torch.ones(5)}, path)
    found = take_inventory(found.dataset, mode)
    if fits:
        check_caches([found], expected(mode))
    else:
        with pytest.raises(UserError, match="no audio text embeddings"):
            check_caches([found], expected(mode))


def test_references_at_another_scale(tmp_path):
    path = write_video_item(tmp_path / "cache", "a")
    references = tmp_path / "rc"
    cache_files.write_latents(references / path.name, filled(CHANNELS, 1, 1, 1), {"reference_downscale": "2"})
    dataset = video_dataset(tmp_path, extra=f"reference_cache_directory = '{references}'")
    found = [take_inventory(dataset, "video")]
    check_caches(found, expected("video", reference_downscale=2))
    with pytest.raises(UserError, match="the caches hold references at 1/2, this run says --reference_downscale 1"):
        check_caches(found, expected("video", reference_downscale=1))


def test_sound_items_without_virtual_geometry(tmp_path):
    from tests.data.caches import config_for

    write_audio_item(tmp_path / "cache", "good", 20)
    write_audio_item(tmp_path / "cache", "old", 20)
    name = cache_names.latent_name("old", 960, 544)
    cache_files.write_latents(tmp_path / "cache" / name, filled(CHANNELS, 1, 1, 1), {})
    (tmp_path / "sounds").mkdir()
    body = f"[[datasets]]\naudio_directory = '{tmp_path}/sounds'\ncache_directory = '{tmp_path}/cache'\n"
    found = take_inventory(config_for(tmp_path, body, "audio").datasets[0], "audio")
    with pytest.raises(
        UserError, match=r"no virtual geometry.*old_0960x0544.*ltx2_cache_latents\.py --ltx2_mode audio"
    ):
        check_caches([found], expected("audio"))
