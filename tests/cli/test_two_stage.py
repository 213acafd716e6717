"""Two-stage sampling from the command line, in the generator and in previews."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.cli.ltx2_generate_video import main as generate
from ltx2_tuner.cli.ltx2_train_network import main as train
from ltx2_tuner.lora import LoRANetwork, Targets, save_original, select_layers
from tests.cli.recipes import write_models
from tests.training.tiny import Clip, write_workspace

UPSAMPLER = Path(__file__).parents[1] / "golden" / "data" / "upsampler" / "tiny_spatial_x2_rational.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("models"))
    shutil.copy(UPSAMPLER, folder / "upsampler.safetensors")
    model = load_transformer(Checkpoint.open(folder / "ltx-2.safetensors"), "video", "cpu", torch.float32)
    network = LoRANetwork(select_layers(model, Targets("video", "t2v")), 4, 8.0)
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.3)
    save_original(folder / "distilled.safetensors", network.matrices(), {}, torch.float32)
    return folder


def two_stage(models: Path, *more: object) -> list[object]:
    flags = ["--sample_two_stage", "--spatial_upsampler_path", models / "upsampler.safetensors"]
    return [*flags, "--sample_stage2_steps", 2, *more]


def size_of(path: Path) -> tuple[int, int, int]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height, sum(1 for _ in container.decode(video=0))


def test_the_generator_makes_full_size(models, tmp_path, capsys):
    arguments = ["--ltx2_checkpoint", models / "ltx-2.safetensors", "--gemma_root", models / "gemma", "--device", "cpu"]
    arguments += ["--mixed_precision", "no", "--prompt", "a cat", "--seed", 3, "--sample_steps", 2]
    arguments += ["--width", 150, "--height", 64, "--frame_count", 9, "--output_dir", tmp_path]
    arguments += two_stage(models, "--distilled_lora_path", models / "distilled.safetensors")
    assert generate([str(argument) for argument in arguments]) == 0
    (clip,) = tmp_path.glob("*.mp4")
    assert size_of(clip) == (128, 64, 9), "floored to 64 pixels"


def test_previews_while_training(models, tmp_path):
    """A preview with a distilled LoRA beside the trained one leaves training as it is."""
    space = write_workspace(tmp_path, models / "ltx-2.safetensors", [Clip()] * 2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 128 --h 64 --f 9 --s 2\n--v none.png a dog --w 128 --h 64 --f 1 --s 1\n")
    sampled = ["--sample_prompts", prompts, "--sample_every_n_steps", 2, "--gemma_root", models / "gemma"]
    sampled += two_stage(models, "--distilled_lora_path", models / "distilled.safetensors")
    assert train(space.arguments("--output_dir", tmp_path / "plain")) == 0
    assert train(space.arguments(*sampled)) == 0
    samples = sorted((space.output / "sample").iterdir())
    assert [path.suffix for path in samples] == [".mp4", ".png", ".mp4", ".png"]
    assert size_of(samples[0]) == (128, 64, 9)

    def weights(folder: Path) -> bytes:
        from safetensors.torch import load_file

        tensors = load_file(folder / "tiny.safetensors")
        return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))

    assert weights(tmp_path / "plain") == weights(space.output)
