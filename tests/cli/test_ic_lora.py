"""The IC-LoRA recipe of the user's guide, step 2 to step 6, with its flags, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from safetensors import safe_open

from ltx2_tuner.checkpoint import SafetensorsFile
from tests.cli.recipes import LAUNCH, SIZE, run, write_models, write_reference, write_scene

COLOURS = {"scene_001": (200, 40, 40), "scene_002": (40, 180, 60), "scene_003": (60, 80, 220)}
REFERENCES = {"scene_001": ".png", "scene_002": ".jpg", "scene_003": ".mp4"}
DATASET = """
[general]
resolution = [{width}, {height}]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
cache_directory = "cache"
reference_cache_directory = "cache_ref"
[[datasets]]
video_directory = "videos"
reference_directory = "references"
target_frames = [1, 17, 33]
"""
PROMPTS = """
--v references/scene_001.png A woman walking through a forest --n blurry, low quality --w 96 --h 64 --f 17 --s 2
--v references/scene_003.mp4 A cat sitting on a windowsill --n distorted --w 96 --h 64 --f 17 --s 2
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def write_project(folder: Path, resolution: tuple[int, int] = SIZE) -> Path:
    for name, colour in COLOURS.items():
        write_scene(folder / "videos", name, colour)
        write_reference(folder / "references" / f"{name}{REFERENCES[name]}", colour)
    text = DATASET.format(width=resolution[0], height=resolution[1])
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    (folder / "sampling_prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


def cache(project: Path, models: Path, *more: object):
    shared = ("--dataset_config", "dataset.toml", "--ltx2_checkpoint", models / "ltx-2.safetensors", "--device", "cpu")
    done = run("ltx2_cache_latents.py", *shared, "--vae_dtype", "bf16", *more, cwd=project)
    gemma = ("--gemma_root", models / "gemma")
    run("ltx2_cache_text_encoder_outputs.py", *shared, *gemma, cwd=project)
    return done


def train(project: Path, models: Path, *more: object, gemma: bool = True, status: int = 0):
    return run(
        "ltx2_train_network.py",
        *("--mixed_precision", "bf16", "--dataset_config", "dataset.toml"),
        *("--ltx2_checkpoint", models / "ltx-2.safetensors"),
        *("--fp8_base", "--fp8_scaled", "--blocks_to_swap", 2, "--sdpa", "--gradient_checkpointing"),
        *("--network_module", "networks.lora_ltx2", "--network_dim", 32, "--network_alpha", 32),
        *("--lora_target_preset", "v2v", "--ltx2_first_frame_conditioning_p", 0.2),
        *("--timestep_sampling", "shifted_logit_normal", "--learning_rate", "1e-4"),
        *("--sample_at_first", "--sample_every_n_epochs", 5, "--sample_prompts", "sampling_prompts.txt"),
        *("--sample_include_reference", "--output_dir", "output", "--output_name", "ltx2_ic_lora"),
        *(("--gemma_root", models / "gemma") if gemma else ()),
        *("--max_train_steps", 2, "--seed", 1, *more),
        cwd=project,
        launcher=() if status else LAUNCH,  # the launcher puts a traceback of its own on a failure
        status=status,
    )


def frames_of(path: Path) -> list:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_the_recipe(models, tmp_path):
    project = write_project(tmp_path)
    cache(project, models)
    for folder in ("cache", "cache_ref"):
        assert len(list((project / folder).glob("*_ltx2.safetensors"))) == 9
    shapes = set()
    for path in (project / "cache_ref").iterdir():
        with safe_open(path, "pt") as file:
            (key,) = (name for name in file.keys() if name.startswith("latents_"))  # noqa: SIM118
            shapes.add(key)
    assert shapes == {"latents_1x2x3_bfloat16"}, "one reference frame whatever the target's length"
    train(project, models)
    lora = SafetensorsFile(project / "output" / "ltx2_ic_lora.safetensors")
    assert lora.metadata["ss_ic_lora_strategy"] == "v2v" and lora.metadata["ss_v2v_training"] == "True"
    assert "ss_reference_downscale_factor" not in lora.metadata
    assert any(".ff." in key or "_ff_net" in key for key in lora.tensors)
    samples = sorted((project / "output" / "sample").glob("*.mp4"))
    assert len(samples) == 2
    frames = frames_of(samples[0])
    assert len(frames) == 17 and frames[0].shape == (SIZE[1], 2 * SIZE[0], 3)
    light = frames[16][:, : SIZE[0]]
    assert light[5, 5].min() > 150, "the reference, on its light ground, is left of the result and held to the end"

    # The trained LoRA says what references it wants, so that generating needs no flag for it.
    plain, referenced = (generate(project, models, name, *flags) for name, flags in GENERATED.items())
    assert not torch.equal(plain, referenced)


GENERATED = {"plain": (), "referenced": ("--reference_image", "references/scene_001.png")}


def generate(project: Path, models: Path, name: str, *flags: object) -> torch.Tensor:
    run(
        "ltx2_generate_video.py",
        *("--ltx2_checkpoint", models / "ltx-2.safetensors", "--gemma_root", models / "gemma", "--device", "cpu"),
        *("--mixed_precision", "no", "--prompt", "a cat", "--seed", 1, "--sample_steps", 2, "--output_dir", name),
        *("--width", 96, "--height", 64, "--frame_count", 9, "--output_type", "latent"),
        *("--lora_weight", "output/ltx2_ic_lora.comfy.safetensors", *flags),
        cwd=project,
    )
    return SafetensorsFile(next((project / name).iterdir())).read("video")


def test_smaller_references_and_precached_samples(models, tmp_path):
    """Half-size references; and with everything precached, training takes neither Gemma nor the encoder."""
    project = write_project(tmp_path, resolution=(128, 128))
    text = PROMPTS.replace("--w 96 --h 64", "--w 128 --h 64")
    (project / "sampling_prompts.txt").write_text(text, encoding="utf-8")
    prompts = ("--sample_prompts", "sampling_prompts.txt")
    shared = ("--dataset_config", "dataset.toml", "--ltx2_checkpoint", models / "ltx-2.safetensors", "--device", "cpu")
    latents = ("--reference_downscale", 2, "--precache_sample_latents", *prompts)
    run("ltx2_cache_latents.py", *shared, *latents, cwd=project)
    failed = train(project, models, gemma=False, status=1)
    assert "--use_precached_sample_prompts" in failed.stderr
    gemma = ("--gemma_root", models / "gemma", "--precache_sample_prompts", *prompts)
    run("ltx2_cache_text_encoder_outputs.py", *shared, *gemma, cwd=project)
    failed = train(project, models, "--use_precached_sample_prompts", gemma=False, status=1)
    assert "hold references at 1/2, this run says --reference_downscale 1" in failed.stderr

    decoder_only(models)
    cached = ("--use_precached_sample_prompts", "--use_precached_sample_latents", "--vae", "decoder only.safetensors")
    (project / "decoder only.safetensors").write_bytes((models / "decoder only.safetensors").read_bytes())
    train(project, models, "--reference_downscale", 2, *cached, gemma=False)
    metadata = SafetensorsFile(project / "output" / "ltx2_ic_lora.comfy.safetensors").metadata
    for key in ("ss_reference_downscale_factor", "reference_downscale_factor", "reference_spatial_scale_factor"):
        assert metadata[key] == "2"
    assert len(list((project / "output" / "sample").glob("*.mp4"))) == 2

    (project / "references" / "scene_001.png").unlink()
    (project / "sampling_prompts.txt").write_text(text.replace("windowsill", "chair"), encoding="utf-8")
    failed = train(project, models, "--reference_downscale", 2, *cached, gemma=False, status=1)
    assert "sample 1: prompt is 'A cat sitting on a windowsill'" in failed.stderr


def decoder_only(models: Path) -> None:
    """The checkpoint's video decoder in a file of its own."""
    from ltx2_tuner.files import write_safetensors

    source = SafetensorsFile(models / "ltx-2.safetensors")
    names = [name for name in source.tensors if name.startswith("vae.") and not name.startswith("vae.encoder.")]
    tensors = {name: source.read(name) for name in names}
    write_safetensors(models / "decoder only.safetensors", tensors, source.metadata)
