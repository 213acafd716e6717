"""The audio-reference recipe of the user's guide, step 2 to step 6, with its flags, on a tiny model; and misuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import SafetensorsFile
from tests.cli.recipes import LAUNCH, SIZE, run, write_models, write_scene, write_sound

DATASET = """
[general]
resolution = [{width}, {height}]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
cache_directory = "cache"
reference_audio_cache_directory = "cache_ref_audio"
separate_audio_buckets = true
[[datasets]]
video_directory = "videos"
reference_audio_directory = "reference_audio"
target_frames = [1, 17, 33]
"""
SIZES = "--w 96 --h 64 --f 17 --s 2"
PROMPTS = f"""
--ra reference_audio/speaker_001.wav A person speaking about nature --n blurry, low quality {SIZES}
--ra reference_audio/speaker_002.flac A woman laughing in a park {SIZES}
"""
TRAIN = (
    *("--fp8_base", "--fp8_scaled", "--blocks_to_swap", 2, "--sdpa", "--gradient_checkpointing"),
    *("--network_module", "networks.lora_ltx2", "--network_dim", 128, "--network_alpha", 128),
    "--audio_ref_use_negative_positions",
    "--audio_ref_mask_reference_from_text_attention",
    *("--timestep_sampling", "shifted_logit_normal", "--learning_rate", "2e-4"),
    *("--sample_at_first", "--sample_every_n_epochs", 5, "--sample_prompts", "sampling_prompts.txt"),
    *("--output_dir", "output", "--max_train_steps", 2, "--seed", 1),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def write_project(folder: Path) -> Path:
    write_scene(folder / "videos", "speaker_001", (200, 60, 60), pitch=300)
    write_scene(folder / "videos", "speaker_002", (60, 60, 200), pitch=500)
    write_sound(folder / "reference_audio" / "speaker_001.wav", 320)
    write_sound(folder / "reference_audio" / "speaker_002.flac", 520, seconds=0.9)
    (folder / "dataset.toml").write_text(DATASET.format(width=SIZE[0], height=SIZE[1]), encoding="utf-8")
    (folder / "sampling_prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


def cache(project: Path, models: Path, mode: str, latent: tuple = (), text: tuple = ()) -> None:
    shared = ("--dataset_config", "dataset.toml", "--ltx2_checkpoint", models / "ltx-2.safetensors")
    shared += ("--ltx2_mode", mode, "--device", "cpu")
    run("ltx2_cache_latents.py", *shared, "--vae_dtype", "bf16", *latent, cwd=project)
    run("ltx2_cache_text_encoder_outputs.py", *shared, "--gemma_root", models / "gemma", *text, cwd=project)


def train(project: Path, models: Path, mode: str, *more: object, gemma: bool = True, status: int = 0):
    return run(
        "ltx2_train_network.py",
        *("--mixed_precision", "bf16", "--dataset_config", "dataset.toml"),
        *("--ltx2_checkpoint", models / "ltx-2.safetensors", "--ltx2_mode", mode, *TRAIN, *more),
        *(("--gemma_root", models / "gemma") if gemma else ()),
        cwd=project,
        launcher=() if status else LAUNCH,  # the launcher puts a traceback of its own on a failure
        status=status,
    )


def test_the_recipe_with_picture_and_sound(models, tmp_path):
    project = write_project(tmp_path)
    cache(project, models, "av")
    references = list((project / "cache_ref_audio").glob("*_ltx2_audio.safetensors"))
    assert len(references) == 6, "one for each crop of each clip"
    more = ("--lora_target_preset", "audio_ref_only_ic", "--audio_ref_mask_cross_attention_to_reference")
    more += ("--ltx2_first_frame_conditioning_p", 0.9, "--output_name", "ltx2_audio_ref_ic_lora")
    done = train(project, models, "av", *more)
    assert "rank 128" in done.stderr and "--audio_ref_use_negative_positions" in done.stderr
    lora = SafetensorsFile(project / "output" / "ltx2_audio_ref_ic_lora.safetensors")
    for key in ("ss_audio_ref_ic_training", "ss_audio_ref_use_negative_positions"):
        assert lora.metadata[key] == "True"
    assert lora.metadata["ss_ic_lora_strategy"] == "audio_ref_only_ic" and "ss_v2v_training" not in lora.metadata
    assert any("audio_to_video_attn" in key for key in lora.tensors)
    assert not any("_attn1_" in key and "audio_attn1" not in key for key in lora.tensors)
    suffixes = sorted(path.suffix for path in (project / "output" / "sample").iterdir())
    assert suffixes == [".mp4", ".mp4", ".wav", ".wav"]

    with_reference = generate(project, models, "with", "--reference_audio", "reference_audio/speaker_001.wav")
    assert not torch.equal(generate(project, models, "without"), with_reference)


def generate(project: Path, models: Path, name: str, *flags: object) -> torch.Tensor:
    """The sound latents of the trained LoRA."""
    run(
        "ltx2_generate_video.py",
        *("--ltx2_checkpoint", models / "ltx-2.safetensors", "--gemma_root", models / "gemma", "--device", "cpu"),
        *("--ltx2_mode", "av", "--mixed_precision", "no", "--prompt", "a cat", "--seed", 1, "--sample_steps", 2),
        *("--width", 64, "--height", 64, "--frame_count", 9, "--output_type", "latent", "--output_dir", name),
        *("--lora_weight", "output/ltx2_audio_ref_ic_lora.safetensors", *flags),
        cwd=project,
    )
    return SafetensorsFile(next((project / name).iterdir())).read("audio")


def test_the_recipe_with_sound_alone(models, tmp_path):
    """As the guide writes it, with what the samples need precached: neither Gemma nor an encoder is loaded."""
    project = write_project(tmp_path)
    prompts = ("--sample_prompts", "sampling_prompts.txt")
    latent, text = ("--precache_sample_latents", *prompts), ("--precache_sample_prompts", *prompts)
    cache(project, models, "audio", latent, text)
    for path in (project / "reference_audio").iterdir():
        path.unlink()  # previews come from the cache
    more = ("--ic_lora_strategy", "audio_ref_only_ic", "--output_name", "ltx2_audio_ref_ic_lora_audioonly")
    train(
        project, models, "audio", *more, "--use_precached_sample_prompts", "--use_precached_sample_latents", gemma=False
    )
    lora = SafetensorsFile(project / "output" / "ltx2_audio_ref_ic_lora_audioonly.safetensors")
    assert lora.metadata["ss_ic_lora_strategy"] == "audio_ref_only_ic"
    assert lora.metadata["ss_lora_target_preset"] == "audio"
    assert not any("video" in key for key in lora.tensors), "no layer between the streams gets an adapter"
    assert [path.suffix for path in (project / "output" / "sample").iterdir()] == [".wav", ".wav"]
