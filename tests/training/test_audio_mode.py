"""Sound-only training, with the whole model and with its sound half alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.checkpoint import Checkpoint, component_id
from ltx2_tuner.data.cache_files import write_audio, write_latents, write_text
from ltx2_tuner.training.draws import ValidationDraws
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from ltx2_tuner.training.sigmas import SigmaSampler
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


@pytest.mark.parametrize(
    ("strategy", "interval", "lengths"),
    [
        ("pad", 100.0, [[14, 20]]),  # one bucket; the shorter one is padded, and its padding is not trained
        ("pad", 0.4, [[14], [20]]),  # buckets of 10 steps: 14 goes to the nearest, 10
        ("truncate", 0.28, [[14, 14]]),  # buckets of 7 steps: both are cut to 14
        ("truncate", 0.4, [[10], [20]]),
    ],
)
def test_lengths_are_padded_with_a_mask_or_cut(space, strategy, interval, lengths):
    config = space.dataset.read_text(encoding="utf-8").replace("audio_bucket_interval = 100.0\n", "")
    space.dataset.write_text(config, encoding="utf-8")
    flags = ["--audio_bucket_strategy", strategy, "--audio_bucket_interval", interval]
    trainer = make_trainer(space.arguments("--ltx2_mode", "audio", *flags))
    found = []
    for batch in trainer.run.data:
        task = trainer.run.mode.prepare(batch, ValidationDraws("x", 0, SigmaSampler())).audio_task
        counted = task.mask.sum(dim=1).tolist()
        assert task.latent.shape[1] == max(counted)
        assert (task.valid is None) == (len(set(counted)) == 1)
        found.append(sorted(counted))
    assert sorted(found) == lengths


@pytest.mark.parametrize("steps", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_one_sound_is_learned(space, steps):
    """The loss falls by more than half (R17, sound alone)."""
    for path in (space.root / "cache").glob("sound0*"):
        path.unlink()
    (sound,) = (space.root / "cache").glob("*_ltx2_audio.safetensors")
    write_audio(sound, torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)), {})
    flags = ["--max_train_steps", steps, "--learning_rate", 1e-2, "--network_dim", 32, "--lr_scheduler", "cosine"]
    trainer = make_trainer(space.arguments("--ltx2_mode", "audio", "--lora_target_preset", "full", *flags))
    before = probe(trainer)
    trainer.train()
    assert probe(trainer) < before / 2


@torch.no_grad()
def probe(trainer) -> float:
    """Sound loss on fixed noise and noise levels."""
    (batch,) = trainer.run.data
    losses = []
    for index in range(6):
        draws = ValidationDraws(f"probe {index}", 0, trainer.run.draws.sampler)
        prepared = trainer.run.mode.prepare(batch, draws)
        losses.append(task_loss(prepared, *prepared.run(trainer.run.model), LossOptions()).audio.mean.item())
    return sum(losses) / len(losses)
