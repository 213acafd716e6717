"""Sound-only training, with the whole model and with its sound half alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.checkpoint import Checkpoint, component_id
from ltx2_tuner.data.cache_files import write_audio, write_latents, write_text
from tests.training.tiny import Workspace, make_trainer, train


@pytest.fixture
def space(tmp_path, checkpoint) -> Workspace:
    source = Checkpoint.open(checkpoint)
    ids = {name: component_id(source, name) for name in ("audio_encoder", "text")}
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "sounds").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index, steps in enumerate((20, 14)):
        stem = f"sound{index}"
        write_latents(cache / f"{stem}_0064x0064_ltx2.safetensors", torch.zeros(8, 1, 1, 1), {}, virtual=(4, 2, 2))
        sound = torch.randn(2, steps, 16, generator=generator)
        write_audio(cache / f"{stem}_0064x0064_ltx2_audio.safetensors", sound, {"component_id": ids["audio_encoder"]})
        write_text(
            cache / f"{stem}_ltx2_te.safetensors",
            torch.randn(16, 64, generator=generator),
            torch.randn(16, 32, generator=generator),
            torch.ones(16, dtype=torch.int64),
            {"component_id": ids["text"], "ltx_mode": "audio"},
        )
    (tmp_path / "data.toml").write_text(
        f"[general]\nresolution = [64, 64]\n[[datasets]]\naudio_directory = '{(tmp_path / 'sounds').as_posix()}'\n"
        f"cache_directory = '{cache.as_posix()}'\nbatch_size = 2\naudio_bucket_interval = 100.0\n",
        encoding="utf-8",
    )
    return Workspace(tmp_path, checkpoint, tmp_path / "data.toml", tmp_path / "output")


def test_the_sound_half_alone_trains_the_same(space, tmp_path):
    whole = train(space.arguments("--ltx2_mode", "audio"))
    half = train(space.arguments("--ltx2_mode", "audio", "--ltx2_audio_only_model", "--output_dir", tmp_path / "half"))
    assert whole.values("loss/audio") == half.values("loss/audio")
    assert len(whole.values("loss/audio")) == 4 and not whole.values("loss/video")
    first, second = (load_file(folder / "tiny.safetensors") for folder in (space.output, tmp_path / "half"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_no_adapter_sits_on_what_does_not_run(space):
    names = list(make_trainer(space.arguments("--ltx2_mode", "audio")).run.network.state_dict())
    assert names and all("audio_attn" in name or "audio_ff" in name for name in names)
    assert not any("video_to_audio" in name or "audio_to_video" in name for name in names)
