"""Two-stage sampling: half size, upsampled, refined."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltx2_tuner.checkpoint.upsampler_file import load_spatial_upsampler
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora import LoRANetwork, Targets, save_original, select_layers
from ltx2_tuner.sampling.conditioning import Conditioning
from ltx2_tuner.sampling.options import SamplingOptions, TwoStageOptions, settle
from ltx2_tuner.sampling.prompts import SamplePrompt
from ltx2_tuner.sampling.sampler import Sampler

PROMPT = SamplePrompt("a cat", width=128, height=64, frame_count=9, sample_steps=2, seed=4)


def make_sampler(checkpoint, two_stage: TwoStageOptions | None, mode: str = "av") -> Sampler:
    options = SamplingOptions(mode=mode, two_stage=two_stage)
    return Sampler(checkpoint, options, device=torch.device("cpu"), dtype=torch.float32, vae_dtype=torch.float32)


def sample(sampler: Sampler, transformer, context, prompt: SamplePrompt = PROMPT, **conditioning):
    return sampler.denoise(transformer, settle(0, prompt, sampler.options), context, Conditioning(**conditioning))


@pytest.fixture
def options(upsamplers) -> TwoStageOptions:
    return TwoStageOptions(upsamplers / "tiny_spatial_x2.safetensors", steps=2)


@pytest.fixture
def distilled(tmp_path, transformer):
    """A LoRA file that changes the model strongly."""
    network = LoRANetwork(select_layers(transformer, Targets("av", "t2v")), 4, 8.0)
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.3)
    path = tmp_path / "distilled lora.safetensors"
    save_original(path, network.matrices(), {}, torch.float32)
    return path


def test_the_result_has_full_size_and_the_first_stage_s_sound(checkpoint, transformer, context, options):
    small = dataclasses.replace(PROMPT, width=64, height=32)
    first = sample(make_sampler(checkpoint, None), transformer, context, small)
    both = sample(make_sampler(checkpoint, options), transformer, context)
    assert first.video.shape == (1, 8, 2, 1, 2) and both.video.shape == (1, 8, 2, 2, 4)
    assert torch.equal(first.audio, both.audio)


def test_the_second_stage_refines_the_upsampled_latents(checkpoint, transformer, context, options):
    """With the model's answer taken away, what is left is the upsampled picture under the second stage's noise."""
    sampler = make_sampler(checkpoint, options)
    seen = []
    upsample = sampler._refiner.upsample
    sampler._refiner.upsample = lambda latents: seen.append(upsample(latents)) or seen[-1]
    result = sample(sampler, transformer, context)
    (upsampled,) = seen
    assert upsampled.shape == result.video.shape and not torch.equal(upsampled, result.video)
    shifted = upsampled + 3
    sampler._refiner.upsample = lambda latents: shifted
    assert not torch.allclose(sample(sampler, transformer, context).video, result.video, atol=1e-2)


def test_guidance_runs_in_the_first_stage_alone(checkpoint, transformer, context, options):
    sampler = make_sampler(checkpoint, options)
    calls = []
    transformer.block_outputs = lambda index, video, audio: calls.append(index) if index == 0 else None
    steps = []
    request = settle(0, PROMPT, sampler.options)
    sampler.denoise(transformer, request, context, on_step=steps.append)
    assert len(calls) == 2 * 2 + 2, "two passes a guided step, then one"
    assert steps == [1, 2, 1, 2] and sampler.step_count(request) == 4


def test_the_distilled_lora_is_active_in_the_second_stage_alone(checkpoint, transformer, context, options, distilled):
    plain = sample(make_sampler(checkpoint, options), transformer, context)
    layers = dict(transformer.named_modules())
    sampler = make_sampler(checkpoint, dataclasses.replace(options, distilled_lora=distilled))
    first, again = (sample(sampler, transformer, context) for _ in range(2))
    assert torch.equal(plain.audio, first.audio)
    assert not torch.allclose(plain.video, first.video, atol=1e-2)
    assert torch.equal(first.video, again.video)
    assert {name: id(module) for name, module in transformer.named_modules()} == {n: id(m) for n, m in layers.items()}


def test_the_distilled_lora_leaves_after_a_failure(checkpoint, transformer, context, options, distilled):
    sampler = make_sampler(checkpoint, dataclasses.replace(options, distilled_lora=distilled))

    def fail(done: int) -> None:
        if done == 1 and any("adapter" in name for name, _ in transformer.named_modules()):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sampler.denoise(transformer, settle(0, PROMPT, sampler.options), context, on_step=fail)
    assert not any("adapter" in name for name, _ in transformer.named_modules())


def test_the_trained_lora_stays_beside_the_distilled_one(checkpoint, transformer, context, options, distilled):
    network = LoRANetwork(select_layers(transformer, Targets("av", "t2v")), 4, 4.0)
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.3)
    alone = sample(
        make_sampler(checkpoint, dataclasses.replace(options, distilled_lora=distilled)), transformer, context
    )
    network.attach(transformer)
    sampler = make_sampler(checkpoint, dataclasses.replace(options, distilled_lora=distilled))
    both = sample(sampler, transformer, context)
    assert not torch.allclose(alone.video, both.video, atol=1e-2)
    network.detach()


@pytest.mark.parametrize("with_small", [True, False])
def test_the_image_is_held_in_both_stages(checkpoint, transformer, context, options, with_small):
    image = torch.randn(1, 8, 1, 2, 4, generator=torch.Generator().manual_seed(2))
    small = torch.randn(1, 8, 1, 1, 2, generator=torch.Generator().manual_seed(3)) if with_small else None
    sampler = make_sampler(checkpoint, options)
    given = []
    upsample = sampler._refiner.upsample
    sampler._refiner.upsample = lambda latents: given.append(latents) or upsample(latents)
    result = sample(sampler, transformer, context, image=image, small_image=small)
    assert torch.equal(result.video[:, :, :1], image)
    expected = image[:, :, 0].unflatten(3, (2, 2)).mean(dim=(2, 4))[:, :, None, None] if small is None else small
    torch.testing.assert_close(given[0][:, :, :1], expected)


@pytest.mark.parametrize("name", ["temporal_x2", "spatial_x1_5_rational"])
def test_other_upsamplers_are_refused(upsamplers, name):
    with pytest.raises(UserError, match="needs a spatial x2 one"):
        load_spatial_upsampler(upsamplers / f"tiny_{name}.safetensors", "cpu", torch.float32)


def test_other_files_are_refused(checkpoint):
    with pytest.raises(UserError, match="is no latent upsampler"):
        load_spatial_upsampler(checkpoint.path, "cpu", torch.float32)


def test_references_do_not_go_with_two_stages(options, caplog):
    settings = SamplingOptions(mode="video", two_stage=options)
    request = settle(0, dataclasses.replace(PROMPT, v2v_ref_path="a.png", width=100), settings)
    assert request.two_stage and request.prompt.v2v_ref_path is None and request.width == 64
    assert "a.png is ignored" in caplog.text
    request = settle(0, dataclasses.replace(PROMPT, ref_audio_path="a.wav"), dataclasses.replace(settings, mode="av"))
    assert not request.two_stage and request.prompt.ref_audio_path == "a.wav"
    assert "made in one" in caplog.text
