"""LoRA outputs, losses, gradients, merged weights and files against those of the official package."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.lora import LoRAMatrices, LoRANetwork, load_lora, save_comfy, save_original, table_of
from ltx2_tuner.lora.formats import LoRAFile
from ltx2_tuner.training.modes import Compute, Prepared
from ltx2_tuner.training.modes.streams import StreamTask
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from tests.golden.cases import Case, assert_close, golden
from tests.golden.test_transformer import load, modality

TOLERANCE = 2e-5
WEIGHTS = {"video_weight": 1.0, "audio_weight": 1.0}


def adapters_of(case: Case) -> LoRAFile:
    """The adapters that a `lora_grad` case feeds."""
    tensors = case.group("lora")
    paths = {name.rsplit(".", 1)[0] for name in tensors}
    alpha = float(case.settings["alpha"])
    modules = {path: LoRAMatrices(tensors[f"{path}.down"], tensors[f"{path}.up"], alpha) for path in paths}
    return LoRAFile(case.name, "original", modules)


@golden("transformer_*/lora_grad*")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_losses_and_gradients(case: Case, checkpointing: bool, frozen: bool) -> None:
    """On torch's own linear layers and on the frozen ones that training uses."""
    if frozen:
        model = load_transformer(Checkpoint.open(case.checkpoint), "av", "cpu", torch.float32, progress=False)
    else:
        model = load(case.checkpoint)
    model.enable_gradient_checkpointing(checkpointing)
    network = LoRANetwork.from_file(model, adapters_of(case)).attach(model)
    streams = {stream: modality(case, stream) for stream in ("video", "audio")}
    for stream in streams.values():
        stream.latent.requires_grad_()
    results = dict(zip(streams, model.train()(**streams)))
    losses = {stream: (results[stream] - case.inputs[f"{stream}_target"]).square().mean() for stream in streams}
    total = losses["video"] + losses["audio"]
    total.backward()

    for stream in streams:
        assert_close(results[stream].detach(), case.outputs[stream], TOLERANCE, stream)
        assert losses[stream].item() == pytest.approx(case.outputs[f"loss_{stream}"].item(), rel=1e-5)
        assert_gradient(streams[stream].latent.grad, case.outputs[f"grad.{stream}_latent"], stream)
    assert total.item() == pytest.approx(case.outputs["loss"].item(), rel=1e-5)
    for path, adapter in network.adapters():
        for part, matrix in (("down", adapter.lora_down), ("up", adapter.lora_up)):
            assert_gradient(matrix.weight.grad, case.outputs[f"grad.lora.{path}.{part}"], f"{path}.{part}")


@golden("transformer_*/lora_grad*")
def test_gradients_of_the_training_objective(case: Case) -> None:
    """The same numbers through what a training step does: modality records, masked losses, their weighted sum."""
    model = load_transformer(Checkpoint.open(case.checkpoint), "av", "cpu", torch.float32, progress=False)
    network = LoRANetwork.from_file(model, adapters_of(case)).attach(model)
    compute = Compute(torch.device("cpu"), torch.float32)
    tasks, modalities = {}, {}
    for stream in ("video", "audio"):
        given = {name: case.inputs[f"{stream}.{name}"] for name in ("latent", "sigma", "positions", "context")}
        context, mask = given.pop("context"), torch.ones(given["latent"].shape[:2], dtype=torch.bool)
        levels = case.inputs[f"{stream}.timesteps"]
        tasks[stream] = StreamTask(**given, target=case.inputs[f"{stream}_target"], mask=mask, clean=levels == 0)
        assert torch.equal(tasks[stream].timesteps(), levels)
        modalities[stream] = compute.modality(tasks[stream], context, None)
    prepared = Prepared(**modalities, video_task=tasks["video"], audio_task=tasks["audio"], has_audio=True, **WEIGHTS)
    terms = task_loss(prepared, *prepared.run(model.train()), LossOptions())
    terms.total.backward()
    assert terms.video.mean.item() == pytest.approx(case.outputs["loss_video"].item(), rel=1e-5)
    assert terms.audio.mean.item() == pytest.approx(case.outputs["loss_audio"].item(), rel=1e-5)
    assert terms.total.item() == pytest.approx(case.outputs["loss"].item(), rel=1e-5)
    for path, adapter in network.adapters():
        for part, matrix in (("down", adapter.lora_down), ("up", adapter.lora_up)):
            assert_gradient(matrix.weight.grad, case.outputs[f"grad.lora.{path}.{part}"], f"{path}.{part}")


@golden("transformer_*/lora_grad*")
@torch.no_grad()
def test_switched_off_and_merged(case: Case) -> None:
    model = load(case.checkpoint)
    weights = {path: model.get_submodule(path).weight.clone() for path in adapters_of(case).modules}
    network = LoRANetwork.from_file(model, adapters_of(case)).attach(model)
    with network.disabled():
        results = model(modality(case, "video"), modality(case, "audio"))
    for stream, result in zip(("video", "audio"), results):
        assert_close(result, case.outputs[f"base.{stream}"], TOLERANCE, stream)
    adapters = dict(network.adapters())
    merged = [name for name in case.outputs if name.startswith("merged.")]
    assert merged
    for name in merged:
        path = name.removeprefix("merged.")
        assert_close(weights[path] + adapters[path].delta(), case.outputs[name], 1e-6, name)


@golden("transformer_*/lora_file*")
@pytest.mark.parametrize("written_as", ["official", "original", "comfy"])
@torch.no_grad()
def test_official_file(case: Case, written_as: str, tmp_path) -> None:
    official = case.directory / case.name.split("/")[0] / "lora_official_format.safetensors"
    model = load(case.checkpoint)
    lora = load_lora(official, table_of(model))
    assert lora.format == "comfy" and not lora.unknown
    if written_as != "official":
        save = {"original": save_original, "comfy": save_comfy}[written_as]
        save(tmp_path / "x.safetensors", lora.modules, lora.metadata)
        lora = load_lora(tmp_path / "x.safetensors", table_of(model))
        assert lora.format == written_as
    LoRANetwork.from_file(model, lora, multiplier=case.settings["strength"]).attach(model)
    results = model(modality(case, "video"), modality(case, "audio"))
    for stream, result in zip(("video", "audio"), results):
        assert_close(result, case.outputs[stream], TOLERANCE, stream)


@golden("transformer_*/lora_file*")
@torch.no_grad()
def test_official_file_fused_in_bfloat16(case: Case) -> None:
    official = case.directory / case.name.split("/")[0] / "lora_official_format.safetensors"
    model = load(case.checkpoint)
    for path, module in load_lora(official, table_of(model)).modules.items():
        weight = model.get_submodule(path).weight
        delta = (module.up * case.settings["strength"]).bfloat16() @ module.down.bfloat16()
        weight.copy_((weight.bfloat16() + delta).float())
    results = model(modality(case, "video"), modality(case, "audio"))
    for stream, result in zip(("video", "audio"), results):
        expected = case.outputs[f"fused_bf16.{stream}"]
        assert (result - expected).square().mean().sqrt() <= 2e-2 * expected.square().mean().sqrt()


def assert_gradient(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within 1e-4 of the largest expected element."""
    assert_close(actual, expected, 1e-4 * expected.abs().max().item() + 1e-7, what)
