"""The transformer against velocities of the official package."""

from __future__ import annotations

from pathlib import Path

import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.models.transformer import LTXTransformer, Modality, Perturbations, SamplePerturbations
from ltx2_tuner.models.transformer.timestep import sinusoid
from tests.golden.cases import Case, assert_close, golden

TOLERANCE = 2e-5
PLAIN = (
    "transformer_*/av_*",
    "transformer_*/video_only*",
    "transformer_*/audio_only*",
    "transformer_*/self_attn_mask*",
)


def load(path: Path, variant: str = "av", dtype: torch.dtype = torch.float32) -> LTXTransformer:
    return load_transformer(Checkpoint.open(path), variant, "cpu", dtype, progress=False)


def modality(case: Case, stream: str, dtype: torch.dtype | None = None) -> Modality | None:
    """The inputs of a stream, or None when the case has none."""
    tensors = case.group(stream)
    if dtype is not None:
        tensors |= {name: tensors[name].to(dtype) for name in ("latent", "context") if name in tensors}
    return Modality(**tensors) if tensors else None


@golden(*PLAIN, "!*/av_bf16*")
@torch.no_grad()
def test_velocities(case: Case) -> None:
    model = load(case.checkpoint)
    model.block_outputs = lambda index, *states: [
        assert_close(state, case.outputs[f"block{index}.{stream}"], TOLERANCE * 10, f"block {index} {stream}")
        for stream, state in zip(("video", "audio"), states)
        if f"block{index}.{stream}" in case.outputs
    ]
    streams = {stream: modality(case, stream) for stream in ("video", "audio")}
    results = dict(zip(streams, model(**streams)))
    for stream, given in streams.items():
        if given is None:
            assert results[stream] is None
            continue
        assert_close(results[stream], case.outputs[stream], TOLERANCE, stream)
        if f"{stream}_x0" in case.outputs:
            denoised = given.latent - results[stream] * given.timesteps.unsqueeze(-1)
            assert_close(denoised, case.outputs[f"{stream}_x0"], TOLERANCE, f"{stream}_x0")


@golden("transformer_*/video_only*", "transformer_*/audio_only*")
@torch.no_grad()
def test_the_small_variants_give_the_same(case: Case) -> None:
    stream = "video" if case.group("video") else "audio"
    streams = {"video": None, "audio": None} | {stream: modality(case, stream)}
    results = dict(zip(streams, load(case.checkpoint, stream)(**streams)))
    assert_close(results[stream], case.outputs[stream], TOLERANCE, stream)


@golden("transformer_*/perturbed*")
@torch.no_grad()
def test_perturbations(case: Case) -> None:
    blocks = frozenset(case.settings["stg_blocks"])
    streams = {stream: modality(case, stream) for stream in ("video", "audio")}
    batch = streams["video"].latent.shape[0]
    mixed = (SamplePerturbations(skip_video_self=blocks),) + (SamplePerturbations(),) * (batch - 1)
    passes = {
        "stg_all": Perturbations.uniform(batch, skip_video_self=blocks, skip_audio_self=blocks),
        "stg_mixed": Perturbations(mixed),
        "isolated": Perturbations.uniform(batch, skip_a2v="all", skip_v2a="all"),
        "skip_a2v": Perturbations.uniform(batch, skip_a2v=blocks),
    }
    model = load(case.checkpoint)
    for name in sorted({name.split(".")[0] for name in case.outputs}):
        for stream, result in zip(streams, model(**streams, perturbations=passes[name])):
            assert_close(result, case.outputs[f"{name}.{stream}"], TOLERANCE, f"{name} {stream}")


@golden("transformer_*/av_bf16*")
@torch.no_grad()
def test_bfloat16(case: Case) -> None:
    streams = {stream: modality(case, stream) for stream in ("video", "audio")}
    for stream, result in zip(streams, load(case.checkpoint, dtype=torch.bfloat16)(**streams)):
        expected = case.outputs[stream].float()
        relative = (result.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert result.dtype == torch.bfloat16
        assert relative <= 2e-2, f"{stream}: relative RMS {relative:.3g}"
    streams = {stream: modality(case, stream, torch.float32) for stream in ("video", "audio")}
    for stream, result in zip(streams, load(case.checkpoint)(**streams)):
        assert_close(result, case.outputs[f"{stream}_f32"], TOLERANCE, f"{stream}_f32")


@golden("transformer_*/timestep_embedding*")
@torch.no_grad()
def test_timestep_embedding(case: Case) -> None:
    timesteps = case.inputs["timesteps"]
    expected = case.outputs["sinusoid"]
    # The reference's frequencies come from a vectorised float32 exp, whose last bit differs between processors: near
    # 1000 rad that bit alone is worth 3e-5 (diffusers on an AMD EPYC is as far from the file).
    half = expected.shape[-1] // 2
    last_bit = torch.finfo(torch.float32).eps * 10000.0 ** (-torch.arange(half).repeat(2) / half)
    difference = (sinusoid(timesteps) - expected).abs()
    assert (difference <= 1e-5 + timesteps.unsqueeze(-1) * last_bit).all(), difference.max()
    model = load(case.checkpoint)
    modules = {name.rsplit(".", 1)[0] for name in case.outputs if name != "sinusoid"}
    assert modules == {name for name, _ in model.named_children() if "adaln" in name}
    for name in modules:
        rows, embedding = model.get_submodule(name)(timesteps[:, None])
        assert_close(rows.flatten(1), case.outputs[f"{name}.mod"], 1e-5, name)
        assert_close(embedding.flatten(1), case.outputs[f"{name}.emb"], 1e-5, name)
