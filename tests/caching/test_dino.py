"""DINOv2 features of clips: what is written, kept and refused. The model is a random one of one layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx2_tuner.caching.run import read_metadata
from ltx2_tuner.cli.ltx2_cache_dino_features import main
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.media.video import read_frames
from tests.caching.latents_world import World

ROOT = Path(__file__).resolve().parents[2]


def write_tiny_dino(folder: Path, width: int = 384) -> Path:
    """A random DINOv2 of one layer, in transformers' layout."""
    prepare_torchaudio()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return write_tiny_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two clips with latents of 1 and 9 frames each."""
    world = World(tmp_path_factory.mktemp("world"))
    world.add_clip("a.mp4", 12)
    world.add_clip("b.mp4", 10)
    world.configure(target_frames=[1, 9])
    assert world.run() == 0
    return world


@pytest.fixture
def run(world, dino):
    """Runs the script in this process; returns its exit status."""
    for path in world.cache.glob("*_dino.safetensors"):
        path.unlink()

    def call(*extra: object) -> int:
        fixed = ["--dataset_config", world.config, "--dino_model", "dinov2_vits14", "--dino_model_path", dino]
        return main([str(token) for token in (*fixed, "--num_workers", 0, "--device", "cpu", *extra)])

    return call


def features_of(world: World, name: str) -> Path:
    return world.cache / f"{name}_0096x0064_ltx2_dino.safetensors"


def test_features_are_those_of_the_resized_frames(world, dino, run, capsys):
    from transformers import Dinov2Model

    assert run("--dino_batch_size", 4) == 0
    assert sorted(path.name[:11] for path in world.cache.glob("*_dino.safetensors")) == ["a_00000-009", "b_00000-009"]
    assert "single frame 2" in capsys.readouterr().out
    path = features_of(world, "a_00000-009")
    (features,) = load_file(path).values()
    assert features.dtype == torch.float16 and features.shape == (9, 1369, 384)
    metadata = read_metadata(path)
    found = {name: metadata[name] for name in ("dino_model", "dino_dim", "num_frames", "num_patches", "architecture")}
    assert list(found.values()) == ["dinov2_vits14", "384", "9", "1369", "ltx2_v1"]
    pixels = torch.from_numpy(read_frames(world.clips / "a.mp4", [0, 5])).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size=(518, 518), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features[[0, 5]].float(), expected, atol=4e-3, rtol=2e-3)


def test_existing_files_are_kept_and_stale_ones_made_again(world, run, capsys):
    assert run() == 0
    times = {path: path.stat().st_mtime_ns for path in world.cache.glob("*_dino.safetensors")}
    world.add_clip("b.mp4", 11)
    assert run("--skip_existing") == 0
    assert "encoded 1 | skipped (existing) 1" in capsys.readouterr().out
    assert features_of(world, "a_00000-009").stat().st_mtime_ns == times[features_of(world, "a_00000-009")]


def test_features_without_a_clip_are_removed_unless_kept(world, run):
    assert run() == 0
    lonely = features_of(world, "gone_00000-009")
    lonely.write_bytes(features_of(world, "a_00000-009").read_bytes())
    assert run("--skip_existing", "--keep_cache") == 0
    assert lonely.is_file()
    assert run("--skip_existing") == 0
    assert not lonely.is_file() and features_of(world, "a_00000-009").is_file()


def test_size_is_told_and_a_full_disk_refused(world, run, capsys, monkeypatch):
    assert run("--dry_run") == 0
    size = 2 * 9 * 2 * 1369 * 384
    assert f"expected size of the DINO features: {size / 1e6:.1f} MB" in capsys.readouterr().out
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("ltx2_tuner.caching.run.shutil.disk_usage", lambda _: usage)
    assert run() == 1
    assert "--ignore_disk_space" in capsys.readouterr().err
    assert run("--ignore_disk_space") == 0


def test_what_does_not_fit_is_said(world, run, tmp_path, capsys):
    for flags, expected in (
        (("--dino_model", "dinov2_vitb14"), "a dinov2 of width 384, but dinov2_vitb14 is a dinov2 of width 768"),
        (("--dino_model_path", tmp_path / "none"), "there is no such folder"),
        (("--dino_model_path", tmp_path), "DINOv2 cannot be loaded"),
        (("--torch_hub_dir", tmp_path), "--dino_model_path"),
        (("--dino_repo_path", tmp_path), "--dino_model_path"),
        (("--dino_batch_size", 0), "--dino_batch_size must be at least 1"),
    ):
        assert run(*flags) == 1, flags
        assert expected in capsys.readouterr().err


def test_latents_come_first(tmp_path, world, dino, capsys):
    other = World(tmp_path, world.checkpoint)
    other.add_clip("a.mp4", 12)
    other.configure(target_frames=[9])
    flags = ["--dino_model", "dinov2_vits14", "--dino_model_path", dino, "--num_workers", 0]
    assert main([str(token) for token in ("--dataset_config", other.config, *flags)]) == 1
    assert "1 of 1 clips have no latents (a_00000-009_0096x0064_ltx2.safetensors)" in capsys.readouterr().err


def test_pictures_alone_have_no_use_for_it(tmp_path, world, capsys):
    other = World(tmp_path, world.checkpoint)
    other.add_clip("a.mp4", 12)
    other.configure(target_frames=[1])
    assert main(["--dataset_config", str(other.config), "--num_workers", "0"]) == 1
    assert "no clips of more than one frame" in capsys.readouterr().err


def test_a_latent_run_removes_the_features_of_clips_that_are_gone(tmp_path, world, dino):
    other = World(tmp_path, world.checkpoint)
    clip = other.add_clip("a.mp4", 12)
    other.add_clip("b.mp4", 12)
    other.configure(target_frames=[9])
    assert other.run() == 0
    flags = ["--dino_model", "dinov2_vits14", "--dino_model_path", dino, "--num_workers", 0, "--device", "cpu"]
    assert main([str(token) for token in ("--dataset_config", other.config, *flags)]) == 0
    clip.unlink()
    clip.with_suffix(".txt").unlink()
    assert other.run() == 0
    assert [path.name for path in other.cache.glob("*_dino*")] == [features_of(other, "b_00000-009").name]


def test_the_script_from_another_folder(world, dino):
    arguments = ["--dataset_config", world.config, "--dino_model", "dinov2_vits14", "--dino_model_path", dino]
    command = [sys.executable, ROOT / "ltx2_cache_dino_features.py", *arguments, "--num_workers", 1, "--device", "cpu"]
    done = subprocess.run([*map(str, command)], cwd=world.folder, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    assert "[Dataset 0] sources 2 | items 4 | encoded 2" in done.stdout
    assert "expected cache size" in done.stderr
