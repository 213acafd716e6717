"""Schedules, steps, guidance and whole sampling runs against the reference."""

from __future__ import annotations

import re

import torch

from ltx2_tuner.sampling.guidance import (
    Guidance,
    ancestral_step,
    apg_term,
    cfg_star_term,
    euler_step,
    guide,
    to_velocity,
    to_x0,
)
from ltx2_tuner.sampling.schedule import DISTILLED_SIGMAS, STAGE2_SIGMAS, ltx2_sigmas
from tests.golden.cases import golden

VARIED = {
    "sigmas": {},
    "nostretch": {"terminal": None},
    "terminal0.05": {"terminal": 0.05},
    "shift_1_3": {"base_shift": 1.0, "max_shift": 3.0},
}


@golden("common/sigma_schedule")
def test_schedules(case):
    for name, expected in case.outputs.items():
        if match := re.fullmatch(r"(.+)\.tokens(\w+)\.steps(\d+)", name):
            options = dict(VARIED[match[1]])
            if match[2] != "default":
                options["tokens"] = int(match[2])
            result = ltx2_sigmas(int(match[3]), **options)
        else:
            result = torch.tensor({"distilled": DISTILLED_SIGMAS, "distilled_stage2": STAGE2_SIGMAS}[name])
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0, msg=name)


@golden("common/steps_and_guidance")
def test_steps(case):
    sigmas, sample, x0, noise = (case.inputs[name] for name in ("sigmas", "sample", "x0", "noise"))
    checked = 0
    for name, expected in case.outputs.items():
        kind, _, index = name.rpartition(".")
        if not kind:
            continue
        now, following = (sigmas[i].item() for i in (int(index), int(index) + 1))
        if kind == "euler":
            result = euler_step(sample, x0, now, following)
        elif kind == "euler_bf16":
            result = euler_step(sample.bfloat16(), x0.bfloat16(), now, following)
        elif kind.startswith("ancestral"):
            result = ancestral_step(sample, x0, noise, now, following, eta=float(kind.removeprefix("ancestral")))
        elif kind == "velocity":
            result = to_velocity(sample, x0, now)
        else:
            assert kind == "denoised"
            result = to_x0(sample, x0, now)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0, msg=name)
        checked += 1
    assert checked


@golden("common/steps_and_guidance")
def test_guidance(case):
    cond, uncond, perturbed, isolated = (case.inputs[name] for name in ("cond", "uncond", "perturbed", "isolated"))
    settings = case.settings
    apg = settings["apg"]
    terms = {
        "cfg": guide(cond, Guidance(cfg=settings["cfg_scale"]), uncond=uncond) - cond,
        "stg": guide(cond, Guidance(stg=settings["stg_scale"]), perturbed=perturbed) - cond,
        "cfg_star_b1": cfg_star_term(cond[:1], uncond[:1], settings["cfg_scale"]),
        "apg_b1": apg_term(cond[:1], uncond[:1], apg["scale"], eta=apg["eta"], norm_threshold=apg["norm_threshold"]),
    }
    for name, numbers in settings.items():
        if name.startswith("multimodal_"):
            scales = Guidance(
                cfg=numbers["cfg_scale"],
                stg=numbers["stg_scale"],
                modality=numbers["modality_scale"],
                rescale=numbers["rescale_scale"],
            )
            terms[name] = guide(cond, scales, uncond=uncond, perturbed=perturbed, isolated=isolated)
    wanted = {name for name in case.outputs if "." not in name}
    assert wanted == terms.keys()
    for name, result in terms.items():
        torch.testing.assert_close(result, case.outputs[name], atol=1e-5, rtol=0, msg=name)
