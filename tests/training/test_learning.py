"""Training learns, and what it saves is what it trained."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.lora import LoRANetwork, load_lora, table_of
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from tests.training.tiny import Clip, make_trainer, train, write_workspace


def probe(trainer, draws: int = 6) -> tuple[float, float | None]:
    """Picture and sound loss on fixed noise and noise levels."""
    from ltx2_tuner.training.draws import ValidationDraws

    batch = next(iter(trainer.run.data))
    video, audio = [], []
    with torch.no_grad():
        for index in range(draws):
            given = ValidationDraws(f"probe {index}", 0, trainer.run.draws.sampler)
            prepared = trainer.run.mode.prepare(batch, given)
            terms = task_loss(prepared, *prepared.run(trainer.run.model), LossOptions())
            video.append(terms.video.mean.item())
            if terms.audio is not None:
                audio.append(terms.audio.mean.item())
    return sum(video) / draws, sum(audio) / draws if audio else None


@pytest.mark.parametrize("steps", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_one_clip_is_learned(tmp_path, checkpoint, steps):
    """Picture and sound loss fall by more than half (R17)."""
    space = write_workspace(tmp_path, checkpoint, [Clip(grid=(1, 2, 2), sound=4)])
    flags = ["--ltx2_mode", "av", "--max_train_steps", steps, "--learning_rate", 1e-2, "--network_dim", 32]
    trainer = make_trainer(space.arguments(*flags, "--lora_target_preset", "full", "--lr_scheduler", "cosine"))
    video_before, audio_before = probe(trainer)
    trainer.train()
    video_after, audio_after = probe(trainer)
    assert video_after < video_before / 2
    assert audio_after < audio_before / 2


@pytest.mark.parametrize("suffix", [".safetensors", ".comfy.safetensors"])
def test_a_saved_adapter_reproduces_the_trained_model(tmp_path, checkpoint, suffix):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)])
    trainer = make_trainer(space.arguments("--ltx2_mode", "av", "--network_alpha", 8, "--max_train_steps", 5))
    trainer.train()
    model = load_transformer(Checkpoint.open(checkpoint), "av", "cpu", torch.float32, progress=False)
    plain = model(*inputs(trainer))
    lora = load_lora(space.output / f"tiny{suffix}", table_of(model))
    LoRANetwork.from_file(model, lora).attach(model)
    with torch.no_grad():
        expected, found = trainer.run.model(*inputs(trainer)), model(*inputs(trainer))
    for before, trained, loaded in zip(plain, expected, found):
        assert (before - trained).abs().max() > 1e-3
        if suffix == ".safetensors":
            assert torch.equal(trained, loaded)
        else:
            torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-5)


def inputs(trainer):
    from ltx2_tuner.training.draws import ValidationDraws

    batch = next(iter(trainer.run.data))
    prepared = trainer.run.mode.prepare(batch, ValidationDraws("probe", 0, trainer.run.draws.sampler))
    return prepared.video, prepared.audio


def test_validation_repeats_its_number_and_leaves_training_alone(tmp_path, checkpoint):
    space = write_workspace(tmp_path, checkpoint, [Clip()] * 3, validation=[Clip(), Clip(grid=(1, 2, 2))])
    flags = ["--max_train_steps", 6, "--network_dropout", 0.2]
    plain = train(space.arguments(*flags))
    validated = train(space.arguments(*flags, "--validate_every_n_steps", 2, "--output_dir", tmp_path / "validated"))
    assert validated.values("loss/current") == plain.values("loss/current")
    assert len(validated.values("val_loss")) == 3
    trainer = make_trainer(space.arguments(*flags, "--validate_every_n_epochs", 1))
    trainer.run.network.eval()
    with torch.no_grad():
        first, second = trainer.run.validator.measure(), trainer.run.validator.measure()
    assert first == second
    assert first["val_loss"] == pytest.approx(first["val_loss/video"])


def test_sampling_leaves_training_alone(tmp_path, checkpoint):
    class Noisy:
        """A sampler that uses up random numbers."""

        def __init__(self) -> None:
            self.steps = []

        def sample(self, transformer, *, step, epoch, label, on_sample):
            assert not transformer.training and not torch.is_grad_enabled()
            torch.randn(10)
            self.steps.append((step, epoch))

    space = write_workspace(tmp_path, checkpoint, [Clip()] * 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    flags = ["--max_train_steps", 6, "--network_dropout", 0.2]
    plain = train(space.arguments(*flags))
    sampler = Noisy()
    sample_flags = ["--sample_prompts", prompts, "--sample_every_n_steps", 4, "--sample_every_n_epochs", 1]
    sample_flags += ["--sample_at_first", "--gemma_root", tmp_path]
    sampled = train(space.arguments(*flags, *sample_flags, "--output_dir", tmp_path / "sampled"), sampler)
    assert sampled.values("loss/current") == plain.values("loss/current")
    assert sampler.steps == [(0, None), (3, 1), (4, None), (6, 2)]


@pytest.mark.parametrize(
    "flags", [["--gradient_checkpointing"], ["--ffn_chunk_target", "all", "--ffn_chunk_size", "5"]]
)
def test_memory_savers_change_no_numbers(tmp_path, checkpoint, flags):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)])
    common = ["--ltx2_mode", "av", "--network_dropout", 0.2]
    plain = train(space.arguments(*common))
    saving = train(space.arguments(*common, *flags, "--output_dir", tmp_path / "saving"))
    for name in ("loss/current", "grad_norm/total"):
        assert saving.values(name) == pytest.approx(plain.values(name), rel=1e-5)


def test_accumulated_batches_are_one_large_batch(tmp_path, checkpoint):
    """Gradients of four micro-batches against one batch of four, same samples, noise and levels (R4)."""
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)] * 4)
    trainer = make_trainer(space.arguments("--ltx2_mode", "av", "--gradient_accumulation_steps", 4))
    data = trainer.run.data._sampler.data
    singles = [data[0, number] for number in range(4)]

    class Fixed:
        def __init__(self, rows):
            self.rows, self.calls = rows, 0
            generator = torch.Generator().manual_seed(0)
            self.noises = [torch.randn(4, 12, 8, generator=generator), torch.randn(4, 17, 32, generator=generator)]

        def caption_dropout(self, count):
            return torch.zeros(count, dtype=torch.bool)

        first_frame = caption_dropout

        def sigma(self, tokens, buckets=None):
            return torch.tensor([0.2, 0.5, 0.7, 0.9])[self.rows]

        def noise(self, shape):
            self.calls += 1
            return self.noises[self.calls - 1][self.rows]

    def gradients(batches, rows):
        for parameter in trainer.run.network.parameters():
            parameter.grad = None
        for batch, chosen in zip(batches, rows):
            prepared = trainer.run.mode.prepare(batch, Fixed(chosen))
            terms = task_loss(prepared, *prepared.run(trainer.run.model), LossOptions())
            (terms.total / len(batches)).backward()
        return [parameter.grad for parameter in trainer.run.network.parameters()]

    def join(batches):
        if isinstance(batches[0], dict):
            return {key: join([batch[key] for batch in batches]) for key in batches[0] if batches[0][key] is not None}
        if isinstance(batches[0], torch.Tensor):
            return torch.cat(batches)
        return [item for batch in batches for item in batch] if isinstance(batches[0], list) else batches[0]

    apart = gradients(singles, [[0], [1], [2], [3]])
    together = gradients([join(singles)], [[0, 1, 2, 3]])
    assert any(gradient.abs().max() > 0 for gradient in apart)
    for left, right in zip(apart, together):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
