"""Sound through the real scripts: clips with sound, clips without, pictures, cached once and trained in many ways."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.cli import ltx2_cache_latents, ltx2_cache_text_encoder_outputs, ltx2_train_network
from ltx2_tuner.data.cache_files import read_audio
from ltx2_tuner.text_encoding import write_tiny_gemma
from tests.media.zoo import make_clip, numbered_frames, tone
from tests.training.tiny import Recorder, Workspace, make_trainer

BATCHES = 7  # of an epoch: ten clips and three pictures in twos
DATASET = """
[general]
resolution = [96, 64]
batch_size = 2
[[datasets]]
video_directory = "{root}/clips"
cache_directory = "{root}/{cache}/clips"
target_frames = [17]
[[datasets]]
image_directory = "{root}/pictures"
cache_directory = "{root}/{cache}/pictures"
{extra}
"""


class Mixed(Workspace):
    """Clips with sound of every kind, clips without, a damaged one, pictures."""

    def cache(self, mode: str, *, config: Path | None = None) -> tuple[int, int]:
        """Run both caching scripts; returns their exit statuses."""
        shared = ["--dataset_config", config or self.dataset, "--ltx2_checkpoint", self.checkpoint]
        shared += ["--ltx2_mode", mode, "--device", "cpu"]
        latents = [*shared, "--vae_dtype", "float32", "--num_workers", 0]
        text = [*shared, "--gemma_root", self.root / "gemma"]
        return (
            ltx2_cache_latents.main([str(part) for part in latents]),
            ltx2_cache_text_encoder_outputs.main([str(part) for part in text]),
        )

    def configure(self, name: str, cache: str = "cache", extra: str = "") -> Path:
        path = self.root / name
        text = DATASET.format(root=self.root.as_posix(), cache=cache, extra=extra)
        path.write_text(text, encoding="utf-8")
        return path


def make_sources(root: Path) -> None:
    clips, pictures = root / "clips", root / "pictures"
    clips.mkdir()
    pictures.mkdir()
    frames = numbered_frames(26)
    for number in range(3):
        make_clip(clips / f"loud{number}.mp4", frames, sound=tone(48000, 1.0))
    for number in range(2):
        make_clip(clips / f"mute{number}.mp4", frames)
    make_clip(clips / "silence.mp4", frames, sound=np.zeros((2, 48000), np.float32))
    make_clip(clips / "short.mp4", frames, sound=tone(48000, 0.3))
    make_clip(clips / "long.mp4", frames, sound=tone(48000, 3.0))
    make_clip(clips / "mono.mkv", frames, sound=tone(8000, 1.0, 1), sound_rate=8000, layout="mono")
    make_clip(clips / "surround.mp4", frames, sound=tone(48000, 1.0, 6), layout="5.1")
    (clips / "cut.mp4").write_bytes((clips / "loud0.mp4").read_bytes()[:2000])
    (clips / "empty.mp4").write_bytes(b"")
    for number in range(3):
        Image.fromarray(frames[number]).save(pictures / f"picture{number}.png")
    for path in [*clips.iterdir(), *pictures.iterdir()]:
        path.with_suffix(".txt").write_text(f"about {path.stem}", encoding="utf-8")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Mixed:
    root = tmp_path_factory.mktemp("mixed")
    write_tiny_checkpoint(root / "tiny.safetensors")
    write_tiny_gemma(root / "gemma")
    make_sources(root)
    return Mixed(root, root / "tiny.safetensors", root / "data.toml", root / "output")


@pytest.fixture(scope="module")
def cached(mixed) -> Mixed:
    mixed.configure("data.toml")
    mixed.cache("av")
    return mixed


def run(space: Workspace, *flags: object, steps: int = BATCHES) -> tuple[Recorder, object]:
    """Train in mode av; returns what was logged and the trainer."""
    recorder = Recorder()
    trainer = make_trainer(space.arguments("--ltx2_mode", "av", "--max_train_steps", steps, *flags), recorder)
    trainer.train()
    recorder.steps = [numbers for numbers in recorder.steps if "loss/current" in numbers]
    return recorder, trainer


def heard_batches(trainer, epoch: int = 1) -> list[list[bool]]:
    """Which items of each batch have sound, in training order; from the names of the cache files."""
    data = trainer.run.data._sampler.data
    return [
        [Path(str(item.latent_path).replace("_ltx2.", "_ltx2_audio.")).is_file() for item in found]
        for found in (data.batch_items(epoch, number) for number in data.order(epoch))
    ]


def test_every_kind_of_sound_is_counted(mixed, capsys):
    mixed.configure("counted.toml", "counted")
    status, _ = mixed.cache("av", config=mixed.root / "counted.toml")
    output = capsys.readouterr().out
    assert status == 0, "a damaged clip is counted, but its sound was not lost alone"
    assert "sources 12 | items 10 | encoded 10 | skipped (existing) 0 | failed 2" in output
    assert "Audio: encoded 8, failed 0, no audio 2, silent 1" in output
    assert re.search(r"failed: \[Dataset 0\] cut\.mp4: ", output) and "empty.mp4" in output
    lengths = {
        path.name.split("_")[0]: read_audio(path).length
        for path in (mixed.root / "counted" / "clips").glob("*_ltx2_audio.safetensors")
    }
    # 17 frames are 0.68 s: 69 mel frames, 18 steps; 0.3 s of sound are 8, and the encoder's last block may add one.
    assert lengths.pop("short") in (8, 9)
    assert lengths == dict.fromkeys(("loud0", "loud1", "loud2", "silence", "long", "mono", "surround"), 18)


@pytest.mark.parametrize("separate", [False, True])
def test_clips_with_and_without_sound_and_pictures_train_together(cached, separate, caplog):
    flags = ["--audio_supervision_mode", "warn", "--audio_supervision_warmup_steps", BATCHES]
    flags += ["--audio_supervision_check_interval", BATCHES, *(["--separate_audio_buckets"] if separate else [])]
    recorder, trainer = run(cached, *flags)
    heard = heard_batches(trainer)
    blended = sum(any(batch) and not all(batch) for batch in heard)
    assert blended == 0 if separate else blended > 0
    supervised = sum(map(any, heard))
    assert f"only {supervised} of {BATCHES} batches had sound" in caplog.text
    assert recorder.values("audio/supervised_share")[-1] == pytest.approx(supervised / BATCHES)
    assert [("loss/audio" in step) for step in recorder.steps] == [any(batch) for batch in heard]
    assert all(np.isfinite(step["loss/current"]) for step in recorder.steps)
    assert ("batches may mix" in caplog.text) != separate


def test_the_monitor_can_stop_a_run(cached, capsys):
    flags = ["--audio_supervision_mode", "error", "--audio_supervision_warmup_steps", 2]
    flags += ["--audio_supervision_check_interval", 1, "--audio_supervision_min_ratio", 1.0]
    assert ltx2_train_network.main(cached.arguments("--ltx2_mode", "av", "--max_train_steps", 9, *flags)) == 1
    assert "batches had sound" in capsys.readouterr().err


def test_the_plan_and_the_share_of_sound_are_told(cached, caplog):
    with caplog.at_level("INFO"):
        make_trainer(cached.arguments("--ltx2_mode", "av"))
    assert "sound: 8 of 10 clips (2 have no sound cache)" in caplog.text
    assert re.search(r"sound is trained in [45] of 7 batches", caplog.text)
    assert re.search(r"audio plan: sound in \d+ % of the batches, the others train the picture alone", caplog.text)
    assert "--audio_silence_regularizer" in caplog.text
    with caplog.at_level("INFO"):
        make_trainer(cached.arguments("--ltx2_mode", "av", "--audio_dop", "--audio_loss_balance_mode", "inv_freq"))
    assert "the others train the plain model's sound (--audio_dop), audio weight by inv_freq" in caplog.text


def test_every_window_has_its_sound_and_tells_its_loss(cached):
    """Even where the last batch of a window has none."""
    flags = ["--gradient_accumulation_steps", 2, "--min_audio_batches_per_accum", 1, "--seed", 1]
    recorder, trainer = run(cached, *flags, steps=4)
    heard = [any(batch) for batch in heard_batches(trainer)]
    assert any(first and not last for first, last in zip(heard[::2], heard[1::2]))
    assert all("loss/audio" in step and "loss/video" in step for step in recorder.steps)


def test_sound_first_where_its_probability_is_one(cached):
    recorder, _ = run(cached, "--audio_batch_probability", 1.0)
    heard = ["loss/audio" in step for step in recorder.steps]
    assert heard == sorted(heard, reverse=True) and len(set(heard)) == 2


def test_silence_stands_in_but_does_not_count_as_sound(cached):
    flags = ["--audio_silence_regularizer", "--audio_silence_regularizer_weight", 0.5, "--separate_audio_buckets"]
    recorder, trainer = run(cached, *flags)
    heard = [any(batch) for batch in heard_batches(trainer)]
    assert all("loss/audio" in step for step in recorder.steps)
    assert recorder.values("audio/supervised_share")[-1] == pytest.approx(sum(heard) / BATCHES)
    for step, has_sound in zip(recorder.steps, heard):
        weight = 1.0 if has_sound else 0.5
        assert step["loss/current"] == pytest.approx(step["loss/video"] + weight * step["loss/audio"], rel=1e-5)


def test_silence_alone_needs_no_sound_at_all(mixed, tmp_path, caplog, capsys):
    (mixed.root / "mute").mkdir()
    for name in ("mute0.mp4", "mute0.txt"):
        (mixed.root / "mute" / name).write_bytes((mixed.root / "clips" / name).read_bytes())
    config = tmp_path / "mute.toml"
    config.write_text(
        f'[[datasets]]\nresolution = [96, 64]\nvideo_directory = "{(mixed.root / "mute").as_posix()}"\n'
        f'cache_directory = "{(tmp_path / "cache").as_posix()}"\ntarget_frames = [17]\n',
        encoding="utf-8",
    )
    mixed.cache("av", config=config)
    flags = ["--dataset_config", config, "--output_dir", tmp_path / "output"]
    assert ltx2_train_network.main(mixed.arguments("--ltx2_mode", "av", *flags)) == 1
    assert "train with --ltx2_mode video" in capsys.readouterr().err
    recorder, _ = run(mixed, *flags, "--audio_silence_regularizer", steps=2)
    assert "trains every item on silence" in caplog.text
    assert len(recorder.values("loss/audio")) == 2


def test_rare_sound_weighs_more(cached):
    """inv_freq, by its formula over the batches that were really trained."""
    flags = ["--audio_loss_weight", 0.5, "--audio_loss_balance_mode", "inv_freq", "--audio_loss_balance_beta", 0.3]
    flags += ["--audio_loss_balance_eps", 0.1, "--audio_loss_balance_max", 0.7, "--audio_loss_balance_ema_init", 0.9]
    recorder, _ = run(cached, *flags)
    presence = 0.9
    for step in recorder.steps:
        presence = 0.7 * presence + 0.3 * ("loss/audio" in step)
        assert step["loss/audio_presence_ema"] == pytest.approx(presence, rel=1e-5)
        if "loss/audio" in step:
            weight = min(0.5 / max(presence, 0.1), 0.7)
            assert step["loss/audio_weight_effective"] == pytest.approx(weight, rel=1e-5)
            total = step["loss/video"] + weight * step["loss/audio"]
            assert step["loss/current"] == pytest.approx(total, rel=1e-5)


def test_sound_is_weighed_by_the_size_of_its_loss(cached):
    """ema_mag, by its formula over the losses that were really logged."""
    flags = ["--audio_loss_balance_mode", "ema_mag", "--audio_loss_balance_target_ratio", 0.5]
    flags += ["--audio_loss_balance_ema_decay", 0.8, "--audio_loss_balance_min", 0.01]
    recorder, _ = run(cached, *flags)
    video = audio = 1.0
    for step in recorder.steps:
        video = 0.8 * video + 0.2 * step["loss/video"]
        if "loss/audio" in step:
            audio = 0.8 * audio + 0.2 * step["loss/audio"]
            assert step["loss/audio_weight_effective"] == pytest.approx(0.5 * video / audio, rel=1e-4)
        assert step["loss/audio_loss_ema"] == pytest.approx(audio, rel=1e-5)
        assert step["loss/video_loss_ema"] == pytest.approx(video, rel=1e-5)


def test_weights_of_the_command_line_and_of_a_dataset(cached):
    """The second dataset, of pictures, sets its own picture weight."""
    config = cached.configure("weights.toml", extra="video_loss_weight = 0.25")
    flags = ["--dataset_config", config, "--video_loss_weight", 2.0, "--audio_loss_weight", 0.1]
    recorder, trainer = run(cached, *flags)
    data = trainer.run.data._sampler.data
    pictures = [data.batch_items(1, number)[0].key.startswith("picture") for number in data.order(1)]
    assert set(pictures) == {True, False}
    for step, is_picture in zip(recorder.steps, pictures):
        weight = 0.25 if is_picture else 2.0
        total = weight * step["loss/video"] + 0.1 * step.get("loss/audio", 0.0)
        assert step["loss/current"] == pytest.approx(total, rel=1e-5)


def test_the_rates_of_the_guide(cached):
    flags = ["--learning_rate", 1e-4, "--audio_lr", 1e-5, "--lr_args", "audio_attn=1e-6", "video_to_audio=5e-6"]
    trainer = make_trainer(cached.arguments("--ltx2_mode", "av", "--lora_target_preset", "v2v", *flags))
    rates = {id(p): group["lr"] for group in trainer.run.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.run.network.named_parameters():
        expected = 1e-4
        if "video_to_audio" in name:
            expected = 5e-6
        elif "audio_attn" in name:
            expected = 1e-6
        elif "audio_" in name:
            expected = 1e-5
        assert rates[id(parameter)] == expected, name
    assert set(rates.values()) == {1e-4, 1e-5, 1e-6, 5e-6}


def test_the_audio_preset_and_its_own_noise_level(cached, caplog):
    """Batches without sound reach none of its adapters; they train nothing and stop nothing."""
    flags = ["--lora_target_preset", "audio", "--independent_audio_timestep"]
    recorder, trainer = run(cached, *flags, steps=BATCHES)
    names = [name for name, _ in trainer.run.network.named_parameters()]
    assert names and all("audio_attn" in name or "audio_ff" in name for name in names)
    assert "reaches no adapter" in caplog.text
    assert all(step["grad_norm/total"] > 0 for step in recorder.steps if "loss/audio" in step)
    levels = trainer._used_sigmas
    assert levels["timestep/used_values_audio"] and not set(levels["timestep/used_values_audio"]) & set(
        levels["timestep/used_values"]
    )


def test_validation_hears_too(cached, tmp_path):
    heard = tmp_path / "heard"
    shutil.copytree(cached.root / "cache" / "clips", heard, ignore=lambda _, names: [n for n in names if "mute" in n])
    extra = (
        f'[[validation_datasets]]\nvideo_directory = "{cached.root.as_posix()}/clips"\n'
        f'cache_directory = "{heard.as_posix()}"\ntarget_frames = [17]\n'
    )
    config = cached.configure("validation.toml", extra=extra)
    recorder = Recorder()
    flags = ["--ltx2_mode", "av", "--dataset_config", config, "--validate_every_n_steps", 2, "--max_train_steps", 2]
    make_trainer(cached.arguments(*flags), recorder).train()
    for name in ("val_loss", "val_loss/video", "val_loss/audio"):
        assert len(recorder.values(name)) == 1


def test_caches_of_mode_video_name_the_commands_that_mend_them(mixed, capsys):
    config = mixed.configure("video.toml", "video cache")
    mixed.cache("video", config=config)
    arguments = mixed.arguments("--ltx2_mode", "av", "--dataset_config", config, "--max_train_steps", 1)
    capsys.readouterr()
    assert ltx2_train_network.main(arguments) == 1
    message = capsys.readouterr().err
    commands = re.findall(r"python (ltx2_\w+)\.py --dataset_config (\S.*?) --ltx2_mode (\w+)", message)
    wanted = ("ltx2_cache_latents", "ltx2_cache_text_encoder_outputs")
    assert commands == [(name, str(config), "av") for name in wanted], message
    mixed.cache("av", config=config)  # those two commands
    assert ltx2_train_network.main(arguments) == 0


def test_text_of_mode_video_names_its_command(cached, mixed, capsys):
    """Sound latents are there, sound text is not."""
    config = mixed.configure("half.toml", "half")
    mixed.cache("av", config=config)
    shared = ["--dataset_config", config, "--ltx2_checkpoint", mixed.checkpoint, "--device", "cpu"]
    text = [*shared, "--ltx2_mode", "video", "--gemma_root", mixed.root / "gemma"]
    ltx2_cache_text_encoder_outputs.main([str(part) for part in text])
    capsys.readouterr()
    assert ltx2_train_network.main(mixed.arguments("--ltx2_mode", "av", "--dataset_config", config)) == 1
    message = capsys.readouterr().err
    assert "no audio text embeddings" in message and "ltx2_cache_text_encoder_outputs.py --ltx2_mode av" in message


def test_no_stacked_tensor_of_unequal_size(cached):
    """The usual failure of mixed batches elsewhere: every batch of an epoch stacks, in every order."""
    _, trainer = run(cached, steps=1)
    data = trainer.run.data._sampler.data
    for epoch in range(1, 6):
        for number in range(len(data)):
            batch = data[epoch, number]
            sizes = {len(batch["audio_lengths"]), len(batch["latents"]["latents"]), len(batch["item_keys"])}
            assert len(sizes) == 1
            text = batch["conditions"]
            assert text["audio_prompt_embeds"].shape[:2] == text["video_prompt_embeds"].shape[:2]
            assert torch.isfinite(batch["latents"]["latents"].float()).all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ltx2_mode", "video", "--independent_audio_timestep"], "--independent_audio_timestep needs"),
        (["--ltx2_mode", "video", "--audio_supervision_mode", "warn"], "--audio_supervision_mode needs"),
        (["--audio_supervision_check_interval", 0], "--audio_supervision_check_interval"),
        (["--audio_supervision_min_ratio", 1.5], "--audio_supervision_min_ratio"),
        (["--audio_silence_regularizer_weight", -1], "--audio_silence_regularizer_weight must be ≥ 0"),
        (["--audio_loss_balance_mode", "inv_freq", "--audio_loss_balance_beta", 0], "--audio_loss_balance_beta"),
        (["--audio_loss_balance_mode", "inv_freq", "--audio_loss_balance_ema_init", 2], "ema_init"),
        (["--audio_loss_balance_mode", "inv_freq", "--audio_loss_balance_eps", 0], "--audio_loss_balance_eps"),
        (["--audio_loss_balance_mode", "ema_mag", "--audio_loss_balance_ema_decay", 1], "ema_decay"),
        (["--audio_loss_balance_mode", "ema_mag", "--audio_loss_balance_target_ratio", -1], "target_ratio"),
        (["--audio_loss_balance_mode", "ema_mag", "--audio_loss_balance_min", 5], "--audio_loss_balance_m"),
        (["--audio_batch_probability", 1.2], "--audio_batch_probability"),
        (["--audio_bucket_interval", 0], "--audio_bucket_interval must be above 0"),
    ],
)
def test_values_out_of_range(cached, capsys, flags, expected):
    assert ltx2_train_network.main(cached.arguments("--ltx2_mode", "av", *flags)) == 1
    assert expected in capsys.readouterr().err
