"""Schedules, steps, guidance and whole sampling runs against the reference."""

from __future__ import annotations

import re

import torch

from ltx2_tuner.models.transformer import LTXTransformer, Modality, TransformerConfig
from ltx2_tuner.models.transformer.tokens import patchify_video, unpatchify_audio, unpatchify_video
from ltx2_tuner.models.video_vae import VideoVAEConfig
from ltx2_tuner.sampling.denoise import GuidedStream, denoise
from ltx2_tuner.sampling.guidance import (
    NEUTRAL,
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
from ltx2_tuner.sampling.streams import Grid, audio_stream, video_stream
from tests.golden.cases import assert_close, golden, read_config, read_weights

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


def transformer(case, variant="av"):
    """The case's transformer in float32."""
    weights = read_weights(case.checkpoint, "model.diffusion_model.")
    model = LTXTransformer(TransformerConfig.from_dict(read_config(case.checkpoint)["transformer"]), variant)
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not missing
    return model.eval()


def scales(numbers):
    if numbers is None:
        return NEUTRAL
    return Guidance(
        cfg=numbers["cfg_scale"],
        stg=numbers["stg_scale"],
        modality=numbers["modality_scale"],
        rescale=numbers["rescale_scale"],
        stg_blocks=tuple(numbers["stg_blocks"]),
    )


def grid_of(case):
    config = VideoVAEConfig.from_dict(read_config(case.checkpoint)["vae"])
    return Grid(config.spatial_scale, config.temporal_scale)


@golden("transformer_*/sample_plain", "transformer_*/sample_guided", "transformer_*/sample_cfg_i2v")
def test_whole_runs(case):
    frames, height, width = case.settings["latent_grid"]
    noise = {name: case.inputs[f"{name}_noise_tokens"] for name in ("video", "audio")}
    channels, bins = (case.outputs["audio_latent"].shape[axis] for axis in (1, 3))
    video = video_stream(
        unpatchify_video(noise["video"], frames, height, width),
        case.settings["fps"],
        case.inputs["video_context"],
        case.inputs.get("video_negative_context"),
        image=case.inputs.get("image_latent"),
        grid=grid_of(case),
    )
    audio = audio_stream(
        unpatchify_audio(noise["audio"], channels, bins),
        case.inputs["audio_context"],
        case.inputs.get("audio_negative_context"),
    )
    assert torch.equal(video.positions, case.inputs["video_positions"])
    assert torch.equal(audio.positions, case.inputs["audio_positions"])
    sigmas = ltx2_sigmas(case.settings["steps"])
    assert torch.equal(sigmas, case.inputs["sigmas"])
    video_tokens, audio_tokens = denoise(
        transformer(case),
        GuidedStream(video, scales(case.settings["video_guidance"])),
        GuidedStream(audio, scales(case.settings["audio_guidance"])),
        sigmas,
    )
    assert_close(video_tokens, case.outputs["video_tokens"], 2e-4, "video tokens")
    assert_close(audio_tokens, case.outputs["audio_tokens"], 2e-4, "audio tokens")
    assert_close(unpatchify_video(video_tokens, frames, height, width), case.outputs["video_latent"], 2e-4, "latent")
    assert_close(unpatchify_audio(audio_tokens, channels, bins), case.outputs["audio_latent"], 2e-4, "audio latent")
    if "image_latent" in case.inputs:
        image = patchify_video(case.inputs["image_latent"])
        assert torch.equal(video_tokens[:, : image.shape[1]], image)


@golden("transformer_*/sample_reference")
def test_reference_layout(case):
    """The reference appends the reference tokens, we put them first: the same tokens in another order."""
    frames, height, width = case.settings["target_grid"]
    cells = frames * height * width
    sigma, model = case.settings["sigma"], transformer(case, "video")
    to_ours = torch.cat((torch.arange(cells, case.inputs["noise_tokens"].shape[1]), torch.arange(cells)))
    for sample in range(case.inputs["noise_tokens"].shape[0]):
        one = slice(sample, sample + 1)
        stream = video_stream(
            unpatchify_video(case.inputs["noise_tokens"][one, :cells], frames, height, width),
            case.settings["fps"],
            case.inputs["context"][one],
            image=case.inputs["image_latent"][one],
            reference=case.inputs["reference_latents"][one],
            grid=grid_of(case),
        )
        assert stream.target == slice(len(to_ours) - cells, None)
        assert_close(stream.start(), case.outputs["tokens"][one][:, to_ours], 1e-6, "tokens")
        assert_close(stream.mask, case.outputs["denoise_mask"][one][:, to_ours], 0, "mask")
        assert_close(stream.positions, case.outputs["positions"][one][:, :, to_ours], 1e-6, "positions")
        level = torch.tensor([sigma])
        modality = Modality(stream.start(), level, stream.timesteps(level), stream.positions, stream.context)
        velocity, _ = model(modality, None)
        assert_close(velocity, case.outputs["pred"][one][:, to_ours], 2e-5, "prediction")
