"""A LoRA that we write in ComfyUI's form, loaded by ltx-core and diffusers: all of it is applied, with our result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.lora import LoRANetwork, Targets, save_comfy, select_layers
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from tests.golden.cases import DATA, assert_close, read_weights
from tests.models.transformer import tiny
from tests.oracle import references

pytestmark = pytest.mark.oracle
TOLERANCE = 1e-4
STRENGTH = 0.8


@pytest.fixture(params=["20", "23"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return DATA / f"tiny_ltx2_{request.param}.safetensors"


def load(path: Path) -> LTXTransformer:
    return load_transformer(Checkpoint.open(path), "av", "cpu", torch.float32, progress=False)


def random_network(model: LTXTransformer) -> LoRANetwork:
    """Every linear layer of the blocks, with an alpha that is not the rank."""
    network = LoRANetwork(select_layers(model, Targets("av", "full")), 4, 8.0)
    generator = torch.Generator().manual_seed(0)
    for _, adapter in network.adapters():
        for matrix in (adapter.lora_down.weight, adapter.lora_up.weight):
            matrix.data = torch.randn(matrix.shape, generator=generator) * 0.1
    return network


def streams_of(model: LTXTransformer) -> dict[str, Modality]:
    return tiny.inputs(model.config, batch=2, seed=5)


@torch.no_grad()
def test_diffusers_applies_the_whole_file(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load(checkpoint)
    network = random_network(model)
    save_comfy(tmp_path / "lora.safetensors", network.matrices(), {})
    reference = references.diffusers_model(checkpoint)
    plain = references.run_diffusers(reference, **streams_of(model))

    from diffusers import LTX2Pipeline

    state = LTX2Pipeline.lora_state_dict(tmp_path / "lora.safetensors")
    reference.load_lora_adapter(state, prefix="transformer", adapter_name="ours")
    reference.set_adapters(["ours"], [STRENGTH])
    adapted = {name for name, module in reference.named_modules() if getattr(module, "lora_A", None)}
    assert len(adapted) == len(network.paths)

    network.set_multiplier(STRENGTH)
    network.attach(model)
    expected = references.run_diffusers(reference, **streams_of(model))
    for ours, theirs, without in zip(model(**streams_of(model)), expected, plain):
        assert_close(ours, theirs, TOLERANCE)
        assert (theirs - without).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_ltx_core_applies_the_whole_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references.adjust_ltx_core(monkeypatch)
    core = references.ltx_core()
    model = load(checkpoint)
    network = random_network(model)
    save_comfy(tmp_path / "lora.safetensors", network.matrices(), {})
    lora = core.loader.LoraPathStrengthAndSDOps(
        str(tmp_path / "lora.safetensors"), STRENGTH, core.loader.LTXV_LORA_COMFY_RENAMING_MAP
    )
    reference = references.ltx_core_model(checkpoint, dtype=torch.bfloat16, loras=(lora,)).float()
    plain = references.ltx_core_model(checkpoint, dtype=torch.bfloat16).float()
    before = dict(plain.named_parameters())
    changed = {name for name, value in reference.named_parameters() if not torch.equal(value, before[name])}
    assert len(changed) == len(network.paths)

    # ltx-core rounds the delta to bfloat16 and adds it to the weight in bfloat16: round ours in the same places.
    stored = read_weights(checkpoint, references.PREFIX, torch.bfloat16)
    for path, matrices in network.matrices().items():
        fused = stored[f"{path}.weight"] + matrices.delta(STRENGTH).bfloat16()
        model.get_submodule(path).weight.copy_(fused)
    modalities = [references.ltx_core_modality(modality) for modality in streams_of(model).values()]
    nothing = core.perturbations.BatchedPerturbationConfig.empty(2)
    expected = reference(*modalities, nothing)
    for ours, theirs, without in zip(model(**streams_of(model)), expected, plain(*modalities, nothing)):
        assert_close(ours, theirs, TOLERANCE)
        assert (theirs - without).abs().max() > 100 * TOLERANCE
