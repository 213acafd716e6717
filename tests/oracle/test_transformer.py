"""Our transformer against ltx-core and diffusers, on inputs the golden files do not hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.models.transformer import LTXTransformer, Modality, Perturbations, SamplePerturbations
from tests.golden.cases import DATA, assert_close
from tests.models.transformer import tiny
from tests.oracle import references

pytestmark = pytest.mark.oracle
TOLERANCE = 2e-5
STREAMS = ("video", "audio")


@pytest.fixture(params=["20", "23"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return DATA / f"tiny_ltx2_{request.param}.safetensors"


def load(path: Path, variant: str = "av") -> LTXTransformer:
    return load_transformer(Checkpoint.open(path), variant, "cpu", torch.float32, progress=False)


def random_inputs(model: LTXTransformer, *, seed: int = 3, batch: int = 3) -> dict[str, Modality]:
    """Both streams with clean tokens, masked text, and a sigma of their own per sample."""
    streams = tiny.inputs(model.config, batch=batch, seed=seed)
    mask = torch.ones(batch, tiny.TEXT_TOKENS, dtype=torch.int64)
    mask[0, -2:] = 0
    return {name: dataclasses.replace(modality, context_mask=mask) for name, modality in streams.items()}


def compare(actual: tuple, expected: tuple) -> None:
    for stream, ours, theirs in zip(STREAMS, actual, expected):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, TOLERANCE, stream)


def run_core(path: Path, streams: dict[str, Modality | None], perturbations: object = None, **options) -> tuple:
    batch = next(modality for modality in streams.values() if modality is not None).latent.shape[0]
    config = references.ltx_core().perturbations.BatchedPerturbationConfig
    model = references.ltx_core_model(path, **options)
    modalities = [references.ltx_core_modality(streams[name]) for name in STREAMS]
    return model(*modalities, perturbations or config.empty(batch))


@torch.no_grad()
def test_ltx_core_agrees_on_random_inputs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references.adjust_ltx_core(monkeypatch)
    model = load(checkpoint)
    for seed in (3, 4):
        streams = random_inputs(model, seed=seed)
        compare(model(**streams), run_core(checkpoint, streams))


@torch.no_grad()
@pytest.mark.parametrize("disabled", STREAMS)
def test_ltx_core_agrees_on_a_disabled_stream(checkpoint: Path, disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    references.adjust_ltx_core(monkeypatch)
    model = load(checkpoint)
    streams = random_inputs(model)
    streams[disabled] = dataclasses.replace(streams[disabled], enabled=False)
    compare(model(**streams), run_core(checkpoint, streams))


@torch.no_grad()
@pytest.mark.parametrize("absent", STREAMS)
def test_ltx_core_agrees_on_one_stream(checkpoint: Path, absent: str) -> None:
    model = load(checkpoint)
    streams = random_inputs(model) | {absent: None}
    compare(model(**streams), run_core(checkpoint, streams))
    if absent == "audio":
        compare(load(checkpoint, "video")(**streams), run_core(checkpoint, streams, video_only=True))


@torch.no_grad()
def test_ltx_core_agrees_on_self_attention_strengths(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references.adjust_ltx_core(monkeypatch)
    model = load(checkpoint)
    streams = random_inputs(model)
    for name, modality in streams.items():
        tokens = modality.latent.shape[1]
        strengths = torch.rand(3, tokens, tokens, generator=torch.Generator().manual_seed(0))
        strengths[strengths < 0.3] = 0
        strengths.diagonal(dim1=1, dim2=2).fill_(1)
        streams[name] = dataclasses.replace(modality, attention_mask=strengths)
    compare(model(**streams), run_core(checkpoint, streams))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["video_self_attn", "audio_self_attn", "a2v_cross_attn", "v2a_cross_attn"])
def test_ltx_core_agrees_on_perturbations(checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    references.adjust_ltx_core(monkeypatch)
    core = references.ltx_core().perturbations
    model = load(checkpoint)
    streams = random_inputs(model)
    skipped = core.Perturbation(core.PerturbationType[f"SKIP_{kind.upper()}"], [1])
    for mixed in (False, True):
        last = core.PerturbationConfig([] if mixed else [skipped])
        theirs = core.BatchedPerturbationConfig([core.PerturbationConfig([skipped])] * 2 + [last])
        ours = Perturbations.uniform(3, **{f"skip_{kind.removesuffix('_attn').removesuffix('_cross')}": [1]})
        if mixed:
            ours = Perturbations((*ours.samples[:2], SamplePerturbations()))
        compare(model(**streams, perturbations=ours), run_core(checkpoint, streams, theirs))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"rope_type": "interleaved"}, {"frequencies_precision": "float32"}])
def test_ltx_core_agrees_on_other_rotary_settings(
    checkpoint: Path, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references.adjust_ltx_core(monkeypatch)
    changed = tmp_path / "changed.safetensors"
    with safe_open(checkpoint, "pt") as file:
        config = json.loads(file.metadata()["config"])
        config["transformer"] |= changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        write_safetensors(changed, tensors, file.metadata() | {"config": json.dumps(config)})
    model = load(changed)
    streams = random_inputs(model)
    compare(model(**streams), run_core(changed, streams))
    assert (model(**streams)[0] - load(checkpoint)(**streams)[0]).abs().max() > TOLERANCE


@torch.no_grad()
def test_diffusers_agrees_on_random_inputs(checkpoint: Path) -> None:
    reference, model = references.diffusers_model(checkpoint), load(checkpoint)
    for seed in (3, 4):
        streams = random_inputs(model, seed=seed)
        compare(model(**streams), references.run_diffusers(reference, **streams))


@torch.no_grad()
def test_diffusers_agrees_on_isolated_streams(checkpoint: Path) -> None:
    reference, model = references.diffusers_model(checkpoint), load(checkpoint)
    streams = random_inputs(model)
    expected = references.run_diffusers(reference, **streams, isolate_modalities=True)
    compare(model(**streams, perturbations=Perturbations.uniform(3, skip_a2v="all", skip_v2a="all")), expected)
    compare((model(streams["video"], None)[0], None), (expected[0], None))
