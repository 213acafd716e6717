"""Training cases: how noise levels are drawn, and one step from cached latents to the loss of each sample."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.training.modes import AVMode, Compute, ModeOptions, V2VMode
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from ltx2_tuner.training.sigmas import SigmaSampler, token_shift
from tests.golden.cases import Case, assert_close, golden, read_config, read_weights


def parse_variant(name: str) -> tuple[str, torch.Tensor | float, dict[str, float]]:
    """`stretched.tokens256.std0.7` -> mode, shift and sampler settings."""
    mode, *parts = name.split(".")
    text = ".".join(parts)
    settings: dict[str, float] = {}
    shift: torch.Tensor | float = 0.0
    for part in text.replace(".std", " std").replace(".prob", " prob").replace(".eps", " eps").split():
        if part.startswith("tokens"):
            shift = token_shift(int(part[len("tokens") :]))
        elif part.startswith("shift"):
            shift = float(part[len("shift") :])
        elif part.startswith("std"):
            settings["std"] = float(part[3:])
        elif part.startswith("prob"):
            settings["uniform_prob"] = float(part[4:])
        elif part.startswith("eps"):
            settings["eps"] = float(part[3:])
    return mode, shift, settings


@golden("common/timestep_sampling")
def test_sigma_from_draws(case: Case):
    assert_close(
        torch.tensor([token_shift(n) for n in case.inputs["tokens"].tolist()], dtype=torch.float64),
        case.outputs["shift"],
        1e-9,
        "shift",
    )
    variants = [name for name in case.outputs if name != "shift"]
    assert variants
    for name in variants:
        mode, shift, settings = parse_variant(name)
        sampler = SigmaSampler(mode=mode, **settings)
        draws = (case.inputs[key] for key in ("normal", "uniform", "selector"))
        assert_close(sampler.from_draws(*draws, shift), case.outputs[name], 1e-5, name)


@golden("common/timestep_statistics")
def test_sigma_statistics(case: Case):
    names = {name.rsplit(".", 1)[0] for name in case.outputs}
    assert names
    levels = case.inputs["quantile_levels"]
    inner = (levels >= 0.05 - 1e-6) & (levels <= 0.95 + 1e-6)
    for name in sorted(names):
        mode, shift, settings = parse_variant(name)
        sampler = SigmaSampler(mode=mode, shift=shift, **settings)
        values = sampler.sample(torch.full((100_000,), 1), torch.Generator().manual_seed(3))
        assert_close(torch.stack([values.mean(), values.std()]), case.outputs[f"{name}.mean_std"], 0.01, name)
        found = torch.quantile(values, levels)
        assert_close(found[inner], case.outputs[f"{name}.quantiles"][inner], 0.015, name)
        histogram = torch.histc(values, bins=10, min=0, max=1) / len(values)
        assert_close(histogram, case.outputs[f"{name}.hist10"], 0.01, name)


@dataclass
class GivenDraws:
    """Hands out a case's own sigma, noise and conditioning."""

    level: torch.Tensor
    noises: list[torch.Tensor]
    conditioned: torch.Tensor
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def caption_dropout(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.bool)

    def first_frame(self, count: int) -> torch.Tensor:
        return self.conditioned

    def sigma(self, tokens: torch.Tensor, buckets: torch.Tensor | None = None) -> torch.Tensor:
        return self.level

    def audio_sigma(self, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the audio shares the picture's sigma")

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.asked.append(shape)
        return self.noises[len(self.asked) - 1]


def load_model(case: Case, variant: str) -> LTXTransformer:
    config = TransformerConfig.from_dict(read_config(case.checkpoint)["transformer"])
    model = LTXTransformer(config, variant)
    weights = read_weights(case.checkpoint, "model.diffusion_model.")
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def compute() -> Compute:
    return Compute(torch.device("cpu"), torch.float32)


def make_batch(case: Case, **entries) -> dict:
    inputs = case.inputs
    batch = {
        "latents": {
            "latents": inputs["video_latents"],
            "fps": torch.full((len(inputs["sigma"]),), case.settings["fps"]),
        },
        "conditions": {
            "video_prompt_embeds": inputs["video_context"],
            "prompt_attention_mask": inputs["context_mask"],
        },
        "item_keys": ["golden"],
        **entries,
    }
    if "audio_context" in inputs:
        batch["conditions"]["audio_prompt_embeds"] = inputs["audio_context"]
    return batch


@golden("transformer_*/train_av", "transformer_*/train_i2v_av")
def test_training_step(case: Case):
    inputs, outputs = case.inputs, case.outputs
    first = inputs["video_cond_mask"].any(dim=1)
    height, width = inputs["video_latents"].shape[-2:]
    assert inputs["video_cond_mask"].sum().item() == first.sum().item() * height * width
    draws = GivenDraws(inputs["sigma"], [inputs["video_noise_tokens"], inputs["audio_noise_tokens"]], first)
    length = inputs["audio_latents"].shape[2]
    batch = make_batch(
        case,
        audio_latents={"latents": inputs["audio_latents"]},
        audio_lengths=torch.full((len(inputs["sigma"]),), length, dtype=torch.int32),
    )
    prepared = AVMode(ModeOptions(), compute()).prepare(batch, draws)
    for stream in ("video", "audio"):
        task = getattr(prepared, f"{stream}_task")
        assert_close(task.latent, outputs[f"{stream}_noisy"], 1e-6, stream)
        assert_close(task.timesteps(), outputs[f"{stream}_timesteps"], 0, stream)
        assert_close(task.positions, outputs[f"{stream}_positions"], 1e-6, stream)
        assert_close(task.target, outputs[f"{stream}_target"], 1e-6, stream)
        assert torch.equal(task.mask, outputs[f"{stream}_loss_mask"])
    with torch.no_grad():
        video, audio = prepared.run(load_model(case, "av"))
    assert_close(video, outputs["video_pred"], 2e-5, "video")
    assert_close(audio, outputs["audio_pred"], 2e-5, "audio")
    terms = task_loss(prepared, video, audio, LossOptions())
    assert_close(terms.video.per_sample + terms.audio.per_sample, outputs["loss_per_sample"], 1e-4, "loss")
    assert terms.total.item() == pytest.approx(outputs["loss_per_sample"].mean().item(), rel=1e-5)


@golden("transformer_*/train_reference")
def test_training_step_with_a_reference(case: Case):
    inputs, outputs = case.inputs, case.outputs
    draws = GivenDraws(inputs["sigma"], [inputs["video_noise_tokens"]], torch.zeros(2, dtype=torch.bool))
    batch = make_batch(case, ref_latents={"latents": inputs["reference_latents"]})
    options = ModeOptions(reference_downscale=int(case.settings["downscale_factor"]))
    prepared = V2VMode(options, compute()).prepare(batch, draws)
    task = prepared.video_task
    references = task.first_output
    assert_close(task.latent, outputs["tokens"], 1e-6, "tokens")
    assert_close(task.timesteps(), outputs["timesteps"], 0, "timesteps")
    assert_close(task.positions, outputs["positions"], 1e-6, "positions")
    assert_close(task.target, outputs["target"], 1e-6, "target")
    assert torch.equal(task.mask, outputs["loss_mask"][:, references:])
    assert not outputs["loss_mask"][:, :references].any()
    with torch.no_grad():
        video, _ = prepared.run(load_model(case, "video"))
    assert_close(video, outputs["pred_all_tokens"][:, references:], 2e-5, "prediction")
    terms = task_loss(prepared, video, None, LossOptions())
    assert_close(terms.video.per_sample, outputs["loss_per_sample"], 1e-4, "loss")
