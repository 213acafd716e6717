from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ltx2_tuner.sampling.guidance import NEUTRAL, euler_step, guide
from ltx2_tuner.sampling.options import GuidanceOverrides, SamplingOptions, is_distilled, settle
from ltx2_tuner.sampling.prompts import SamplePrompt
from ltx2_tuner.sampling.schedule import ltx2_sigmas, stage2_sigmas


def test_sizes_are_floored_and_said(caplog):
    request = settle(0, SamplePrompt("x", width=770, height=500), SamplingOptions())
    assert (request.width, request.height, request.frames) == (768, 480, 41)
    assert "8n+1" in caplog.text and "41" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ({}, {}, (3.0, 3.0)),
        ({}, {"distilled": True}, (1.0, 1.0)),
        ({}, {"guidance_scale": 2.0}, (2.0, 2.0)),
        ({"guidance_scale": 5.0}, {"guidance_scale": 2.0}, (5.0, 5.0)),
        ({"guidance_scale": 5.0, "cfg_scale": 6.0}, {}, (6.0, 6.0)),
        ({}, {"preset": "ltx23"}, (3.0, 7.0)),
        ({}, {"preset": "legacy"}, (1.0, 1.0)),
        ({}, {"preset": "ltx23", "overrides": GuidanceOverrides(audio_cfg=4.0)}, (3.0, 4.0)),
    ],
)
def test_who_decides_the_prompt_weight(prompt, options, expected):
    request = settle(0, SamplePrompt("x", **prompt), SamplingOptions(**options))
    assert (request.video.cfg, request.audio.cfg) == expected


def test_stg_blocks_follow_the_version_and_the_model_depth():
    options = SamplingOptions(version="2.0", overrides=GuidanceOverrides(stg=1.0))
    assert settle(0, SamplePrompt(), options).video.stg_blocks == (29,)
    assert settle(0, SamplePrompt(), dataclasses.replace(options, version="2.3")).video.stg_blocks == (28,)
    assert settle(0, SamplePrompt(), options, num_blocks=3).video.stg_blocks == (2,)


def test_distilled_names():
    assert is_distilled("models/ltx-2.3-22b-distilled.safetensors")
    assert not is_distilled("distilled things/ltx-2.3-22b-dev.safetensors")


def test_euler_with_a_perfect_model_returns_the_target():
    torch.manual_seed(0)
    x0, sample = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    sigmas = ltx2_sigmas(5).tolist()
    for sigma, following in itertools.pairwise(sigmas):
        sample = euler_step(sample, x0, sigma, following)
    torch.testing.assert_close(sample, x0, atol=1e-6, rtol=0)


def test_neutral_guidance_is_the_conditional_prediction():
    cond, other = torch.randn(2, 1, 5, 3).unbind(0)
    assert torch.equal(guide(cond, NEUTRAL, uncond=other, perturbed=other, isolated=other), cond)
    full = guide(cond, dataclasses.replace(NEUTRAL, cfg=3.0, rescale=1.0), uncond=other)
    torch.testing.assert_close(full.std(), cond.std())


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_stage_two_ends_at_zero(steps):
    sigmas = stage2_sigmas(steps)
    assert len(sigmas) == steps + 1 and sigmas[0] == pytest.approx(0.909375) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_schedules_fall_from_one_to_zero(steps):
    sigmas = ltx2_sigmas(steps)
    assert len(sigmas) == steps + 1 and sigmas[0] == pytest.approx(1) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
