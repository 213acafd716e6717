"""Slider training: the two passes, their targets, the pairs, and what a trained slider does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.training.draws import TrainingDraws
from ltx2_tuner.training.modes.slider import match_statistics
from ltx2_tuner.training.random import DrawKey
from ltx2_tuner.training.sigmas import SigmaSampler
from ltx2_tuner.training.sliders import (
    Geometry,
    ReferencePairs,
    SliderConfig,
    SliderTarget,
    TargetTexts,
    TextTargets,
    load_slider_config,
    parse_range,
)
from tests.training.sliders import make_slider_trainer, text_slider, write_pairs
from tests.training.tiny import Recorder

TEXT = 'mode = "text"\n[[targets]]\npositive = "sharp"\nnegative = "soft"\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def draws(index: int = 0) -> TrainingDraws:
    return TrainingDraws(DrawKey(7, 0, index), SigmaSampler(), first_frame_p=0.5)


def test_a_file_with_defaults(tmp_path):
    slider = load_slider_config(write(tmp_path / "s.toml", TEXT))
    assert slider.mode == "text" and slider.guidance == 1.0 and slider.fps == 25.0
    assert slider.multipliers == (-2.0, -1.0, 0.0, 1.0, 2.0)
    assert slider.targets == (SliderTarget("sharp", "soft", "", 1.0),)
    facts = {"slider_mode": "text", "slider_guidance_strength": 1.0}
    target = {"positive": "sharp", "negative": "soft", "target_class": "", "weight": 1.0}
    assert slider.facts() == {**facts, "slider_targets": [target]}


def test_reference_folders_lie_beside_the_file(tmp_path):
    for name in ("p", "n"):
        (tmp_path / name).mkdir()
    slider = load_slider_config(write(tmp_path / "s.toml", 'mode="reference"\npos_cache_dir="p"\nneg_cache_dir="n"'))
    assert (slider.positive_cache, slider.negative_cache) == (tmp_path / "p", tmp_path / "n")
    assert slider.text_cache == slider.positive_cache


@pytest.mark.parametrize(("value", "expected"), [(2, (2,)), ("-1, 0.5", (-1, 0.5)), ([1, 1, -1], (1, -1))])
def test_ranges(value, expected):
    assert parse_range(value) == expected


@pytest.mark.parametrize("value", ["", "a", [], [True], None, ["nan"], {"a": 1}])
def test_no_ranges(value):
    with pytest.raises(ValueError):
        parse_range(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "mode must be one of text, reference"),
        ('mode = "text"', r"at least one \[\[targets\]\]"),
        ('mode = "text"\ntargets = [3]', r"targets\[0\] must be a table"),
        ('mode = "text"\n[[targets]]\npositive = "a"', r"targets\[0\]: 'negative' must be a text"),
        (TEXT + "weights = 1", "unknown key 'weights', did you mean weight|unknown key 'weights'"),
        (TEXT + "weight = 0", "must be above 0"),
        ('guidance = 2\nguidance_strength = "x"\n' + TEXT, "'guidance_strength' must be a finite number.*'guidance'"),
        ('pos_cache_dir = "x"\n' + TEXT, "belongs to mode reference"),
        ("sample_slider_range = [true]\n" + TEXT, "must be a list of numbers"),
        ('mode = "reference"', "'neg_cache_dir' must name a folder.*'pos_cache_dir' must name"),
        ('mode = "reference"\npos_cache_dir = "x"\nneg_cache_dir = "y"', "there is no folder x"),
        ("mode = ", "cannot be read as TOML"),
    ],
)
def test_mistakes_of_the_file(tmp_path, text, expected):
    with pytest.raises(UserError, match=f"s.toml.*{expected}"):
        load_slider_config(write(tmp_path / "s.toml", text))


def test_matched_statistics():
    like = torch.randn(2, 3, 4) * 3 + 1
    value = match_statistics(torch.randn(2, 3, 4), like)
    assert value.mean() == pytest.approx(like.mean().item(), abs=1e-5)
    assert value.std() == pytest.approx(like.std().item(), rel=1e-5)


def text_targets(count: int, **more) -> TextTargets:
    texts = [TargetTexts(*torch.randn(3, 4, 8)) for _ in range(count)]
    targets = [SliderTarget(f"p{index}", "n", weight=index + 1.0) for index in range(count)]
    return TextTargets(targets, texts, Geometry(8, 1, 2, 3), fps=25.0, guidance=1.0, seed=3, **more)


def test_targets_are_drawn_uniformly_and_again_alike():
    data = text_targets(3, batches_per_step=4)
    assert len(data) == 400
    drawn = [data.target_of(epoch, number) for epoch in (1, 2) for number in range(400)]
    assert drawn == [text_targets(3, batches_per_step=4).target_of(e, n) for e in (1, 2) for n in range(400)]
    assert all(200 < drawn.count(target) < 340 for target in range(3))
    batch = data[1, 0]
    assert batch["latents"]["latents"].shape == (1, 8, 1, 2, 3) and not batch["latents"]["latents"].any()
    assert batch["video_loss_weight"] == drawn[0] + 1.0


def test_a_fresh_network_gives_the_plain_models_loss(tmp_path, checkpoint):
    """With up = 0 both passes predict v of the class prompt, so the losses are known."""
    trainer = make_slider_trainer(text_slider(tmp_path, checkpoint, ltx2_mode="av"))
    batch = trainer.run.data._loader.dataset[1, 0]
    mode, model = trainer.run.mode, trainer.run.model
    passes = dict(mode.passes(batch, draws(), trainer._plain))
    neutral = trainer._plain(passes[1.0].video)
    texts = {name: mode._with_text(passes[1.0].video, batch[name]) for name in ("positive", "negative")}
    delta = trainer._plain(texts["positive"]) - trainer._plain(texts["negative"])
    for sign in (1.0, -1.0):
        assert torch.allclose(passes[sign].video_task.target, match_statistics(neutral + sign * delta, neutral))
    expected = sum((neutral - passes[sign].video_task.target).square().mean() for sign in (1.0, -1.0)) / 2
    _, terms = trainer._learn(batch, draws())
    assert terms.total == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.run.network.multiplier == 1.0
    assert not any("audio_" in path for path in trainer.run.network.paths.values()), "the picture alone is trained"
    assert torch.equal(model(passes[1.0].video, None)[0], neutral), "up = 0"


def test_gradients_are_the_sum_of_both_passes(tmp_path, checkpoint):
    trainer = make_slider_trainer(text_slider(tmp_path, checkpoint, weight=0.5))
    network, model = trainer.run.network, trainer.run.model
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = trainer.run.data._loader.dataset[1, 0]
    trainer._learn(batch, draws())
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    for multiplier, prepared in list(trainer.run.mode.passes(batch, draws(), trainer._plain)):
        network.set_multiplier(multiplier)
        error = model(prepared.video, None)[0] - prepared.video_task.target
        (0.5 * error.square().mean()).backward()
    for gradient, parameter in zip(found, network.parameters()):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_multiplier_comes_back_after_an_exception(tmp_path, checkpoint, monkeypatch):
    trainer = make_slider_trainer(text_slider(tmp_path, checkpoint))
    calls = []

    def fail(loss):
        calls.append(trainer.run.network.multiplier)
        if len(calls) == 2:
            raise RuntimeError

    monkeypatch.setattr(trainer, "_backward", fail)
    with pytest.raises(RuntimeError):
        trainer._learn(trainer.run.data._loader.dataset[1, 0], draws())
    assert calls == [1.0, -1.0] and trainer.run.network.multiplier == 1.0


def test_a_text_slider_moves_the_output_monotonically(tmp_path, checkpoint):
    """Along v_positive - v_negative, at every step of the multiplier."""
    # The tiny model hardly listens to its prompt: a strong guidance stands for prompts that differ more.
    flags = ("--max_train_steps", 40, "--learning_rate", 3e-3, "--guidance_strength", 30)
    trainer = make_slider_trainer(text_slider(tmp_path, checkpoint, *flags), recorder := Recorder())
    trainer.train()
    losses = recorder.values("loss/current")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    batch = trainer.run.data._loader.dataset[1, 0]
    places = []
    for index in range(1000, 1004):  # draws that were not trained on
        prepared = trainer.run.mode.prepare(batch, draws(index))
        texts = [trainer.run.mode._with_text(prepared.video, batch[name]) for name in ("positive", "negative")]
        direction = trainer._plain(texts[0]) - trainer._plain(texts[1])
        row = []
        for multiplier in (-2.0, -1.0, 0.0, 1.0, 2.0):
            trainer.run.network.set_multiplier(multiplier)
            with torch.no_grad():
                row.append((trainer.run.model(prepared.video, None)[0] * direction).sum().item())
        places.append(row)
    for row in places:
        assert row == sorted(row) and row[-1] - row[0] > 0


def test_a_reference_slider_learns_the_pair(tmp_path, checkpoint):
    """At +1 the model predicts the positives better than at -1, and the negatives the other way round."""
    arguments, slider = write_pairs(tmp_path, checkpoint)
    arguments += ["--max_train_steps", "40", "--learning_rate", "3e-3", "--ltx2_first_frame_conditioning_p", "0.5"]
    trainer = make_slider_trainer((arguments, slider), Recorder())
    trainer.train()
    network, errors = trainer.run.network, {}
    for index in range(1000, 1006):
        batch = trainer.run.data._loader.dataset[1, index % 3]
        for sign, prepared in trainer.run.mode.passes(batch, draws(index), None):
            for multiplier in (1.0, -1.0):
                network.set_multiplier(multiplier)
                with torch.no_grad():
                    error = prepared.run(trainer.run.model)[0] - prepared.video_task.target
                key = sign, multiplier
                errors[key] = errors.get(key, 0.0) + error[prepared.video_task.mask].square().mean().item()
    assert errors[1.0, 1.0] < errors[1.0, -1.0]
    assert errors[-1.0, -1.0] < errors[-1.0, 1.0]


def test_both_of_a_pair_get_the_same_draws(tmp_path, checkpoint):
    trainer = make_slider_trainer(write_pairs(tmp_path, checkpoint))
    batch = trainer.run.data._loader.dataset[1, 0]
    for index in range(6):
        (_, positive), (_, negative) = trainer.run.mode.passes(batch, draws(index), None)
        sigma = positive.video_task.sigma
        assert torch.equal(sigma, negative.video_task.sigma)
        assert torch.equal(positive.video_task.mask, negative.video_task.mask)
        tokens = [batch[name]["latents"].flatten(2).transpose(1, 2) for name in ("latents", "ref_latents")]
        noise = [task.target + clean for task, clean in zip((positive.video_task, negative.video_task), tokens)]
        assert torch.allclose(noise[0], noise[1], atol=1e-5)
        assert not torch.equal(positive.video_task.latent, negative.video_task.latent)


def pairs_of(folder: Path) -> SliderConfig:
    return SliderConfig(
        folder / "s.toml",
        "reference",
        positive_cache=folder / "positive",
        negative_cache=folder / "negative",
        text_cache=folder / "positive",
    )


def test_what_has_no_partner_is_named_and_left_out(tmp_path, checkpoint, caplog):
    write_pairs(tmp_path, checkpoint)
    (first, second, _) = sorted((tmp_path / "positive").glob("*_ltx2.safetensors"))
    (tmp_path / "negative" / first.name).unlink()
    (second.parent / f"{second.name.split('_000')[0]}_ltx2_te.safetensors").unlink()
    pairs = ReferencePairs(pairs_of(tmp_path), seed=0)
    assert len(pairs) == 1
    assert f"1 latents are left out, no negative: {first.name}" in caplog.text
    assert f"no text: {second.name}" in caplog.text


def test_no_pair_and_unequal_pairs_are_errors(tmp_path, checkpoint):
    write_pairs(tmp_path, checkpoint)
    paths = sorted((tmp_path / "negative").glob("*_ltx2.safetensors"))
    for path in paths[1:]:
        path.unlink()
    other = sorted((tmp_path / "positive").glob("*_te.safetensors"))[0]
    paths[0].write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="cache both folders with the same"):
        ReferencePairs(pairs_of(tmp_path), seed=0)
    paths[0].unlink()
    with pytest.raises(UserError, match=r"no pairs in .*ltx2_cache_latents.py"):
        ReferencePairs(pairs_of(tmp_path), seed=0)


def test_channels_come_from_the_checkpoint(checkpoint):
    model = TransformerConfig.from_dict(Checkpoint.open(checkpoint).config["transformer"])
    assert model.in_channels == 8
