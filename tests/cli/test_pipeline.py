"""The whole path on a real clip (NASA, public domain; two picture and two sound streams): cache, train, sample."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

from ltx2_tuner.checkpoint import SafetensorsFile, write_tiny_checkpoint
from ltx2_tuner.media.audio import read_audio
from ltx2_tuner.media.write import write_wav
from ltx2_tuner.text_encoding import write_tiny_gemma

ROOT = Path(__file__).resolve().parents[2]
CLIP = ROOT / "tests" / "real" / "nasa_13013_part.mp4"

VIDEO_DATASET = """
[general]
resolution = [96, 64]
caption_extension = ".txt"
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
target_frames = [17]
frame_extraction = "chunk"
target_fps = 25.0
"""
AUDIO_DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
audio_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
"""


# Version 2.0 runs in CI for the mode that uses every module; the two others are the same code.
VERSIONS = {"av": ("2.0", "2.3"), "video": ("2.3",), "audio": ("2.3",)}


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(folder / "tiny.safetensors", version=request.param, seed=0)
    write_tiny_gemma(folder / "gemma", seed=0)
    return folder


def run(*arguments):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result


def go(folder, models, mode, dataset):
    """Cache, train ten steps and sample; returns the output folder and the sample files by ending."""
    config = folder / "dataset.toml"
    config.write_text(dataset.format(folder=folder.as_posix()), encoding="utf-8")
    prompts = folder / "prompts.txt"
    prompts.write_text("A rocket rises --w 96 --h 64 --f 17 --s 2 --n blurry\n", encoding="utf-8")
    shared = ("--dataset_config", config, "--ltx2_checkpoint", models / "tiny.safetensors", "--ltx2_mode", mode)
    run("ltx2_cache_latents.py", *shared, "--vae_dtype", "float32", "--device", "cpu", "--num_workers", 1)
    sampled = ("--sample_prompts", prompts, "--precache_sample_prompts")
    run("ltx2_cache_text_encoder_outputs.py", *shared, "--gemma_root", models / "gemma", "--device", "cpu", *sampled)
    output = folder / "output"
    launch = ("-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no")
    launch += ("--dynamo_backend", "no", "--num_cpu_threads_per_process", 1)
    run(
        *launch,
        "ltx2_train_network.py",
        *shared,
        *sampled,
        *("--sample_every_n_steps", 10, "--sample_merge_audio", "--no-sample_audio_subprocess"),
        *("--max_train_steps", 10, "--network_dim", 4, "--network_alpha", 2, "--learning_rate", "1e-3", "--seed", 1),
        *("--dit_dtype", "float32", "--vae_dtype", "float32", "--max_data_loader_n_workers", 0),
        *("--output_dir", output, "--output_name", "lora"),
    )
    return output, {path.name.split("_")[-1].split(".", 1)[-1]: path for path in (output / "sample").iterdir()}


def check_lora(output, *, sound, picture):
    for name, ending in (("lora.safetensors", ".lora_down.weight"), ("lora.comfy.safetensors", ".lora_A.weight")):
        file = SafetensorsFile(output / name)
        keys = [key for key in file.tensors if key.endswith(ending)]
        assert keys and file.metadata["ss_network_dim"] == "4"
        assert any("audio_" in key for key in keys) == sound
        assert any("audio_" not in key for key in keys) == picture
        assert not any("to_gate_logits" in key for key in keys)
    assert not any(key.endswith(".alpha") for key in SafetensorsFile(output / "lora.comfy.safetensors").tensors)


def put_clip(folder):
    (folder / "clips").mkdir()
    (folder / "clips" / "Löwe 1.mp4").write_bytes(CLIP.read_bytes())
    (folder / "clips" / "Löwe 1.txt").write_text("A rocket rises from its pad.", encoding="utf-8")


@pytest.mark.parametrize("models", VERSIONS["video"], indirect=True)
def test_pictures(models, tmp_path):
    put_clip(tmp_path)
    output, samples = go(tmp_path, models, "video", VIDEO_DATASET)
    assert len(list((tmp_path / "cache").glob("*_ltx2.safetensors"))) == 83 // 17
    check_lora(output, sound=False, picture=True)
    assert set(samples) == {"mp4"}
    with av.open(str(samples["mp4"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17


@pytest.mark.parametrize("models", VERSIONS["av"], indirect=True)
def test_pictures_and_sound(models, tmp_path):
    put_clip(tmp_path)
    output, _ = go(tmp_path, models, "av", VIDEO_DATASET)
    assert len(list((tmp_path / "cache").glob("*_ltx2_audio.safetensors"))) == 83 // 17
    check_lora(output, sound=True, picture=True)
    merged = next((output / "sample").glob("*_av.mp4"))
    with av.open(str(merged)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        lengths = [float(stream.duration * stream.time_base) for stream in (video, audio)]
    assert lengths[0] == pytest.approx(17 / 25, abs=1e-3) and abs(lengths[0] - lengths[1]) < 0.03


@pytest.mark.parametrize("models", VERSIONS["audio"], indirect=True)
def test_sound_alone(models, tmp_path):
    (tmp_path / "clips").mkdir()
    samples, rate = read_audio(CLIP)
    write_wav(tmp_path / "clips" / "voice.wav", samples, rate)
    (tmp_path / "clips" / "voice.txt").write_text("A man talks about a rocket.", encoding="utf-8")
    output, sampled = go(tmp_path, models, "audio", AUDIO_DATASET)
    check_lora(output, sound=True, picture=False)
    assert set(sampled) == {"wav"}
