"""Loading the components: precisions, placement, merging, and files that do not fit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import (
    Checkpoint,
    load_audio_decoder,
    load_audio_encoder,
    load_text_connectors,
    load_transformer,
    load_video_decoder,
    load_video_encoder,
    load_vocoder,
    write_tiny_checkpoint,
)
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.models.transformer import Modality
from ltx2_tuner.models.transformer.tokens import audio_positions, video_positions
from ltx2_tuner.quantization import DenseLinear, Fp8Linear, FrozenLinear, Nf4Linear, fp8, nf4
from ltx2_tuner.quantization.formats import WeightFormat

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
DIT = "model.diffusion_model."
QUERY = "transformer_blocks.1.attn1.to_q"
FP8 = WeightFormat("fp8", fp8_scales="none")


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    write_tiny_checkpoint(path, request.param)
    return Checkpoint.open(path)


def load(checkpoint: Checkpoint, variant: str = "av", dtype: torch.dtype = torch.float32, **options):
    return load_transformer(checkpoint, variant, options.pop("device", "cpu"), dtype, progress=False, **options)


def velocities(model) -> list[torch.Tensor]:
    """Outputs of a small forward pass of all streams the model has."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.6])

    def modality(stream: str, tokens: int, channels: int, positions: torch.Tensor) -> Modality:
        return Modality(
            latent=torch.randn(1, tokens, channels, generator=generator),
            sigma=sigma,
            timesteps=sigma[:, None],
            positions=positions,
            context=torch.randn(1, 8, model.config.context_width(stream), generator=generator),
        )

    video = modality("video", 4, 8, video_positions(1, 2, 2, 24.0)) if "video" in model.streams else None
    audio = modality("audio", 3, 32, audio_positions(3)) if "audio" in model.streams else None
    with torch.no_grad():
        return [output for output in model(video, audio) if output is not None]


@pytest.mark.parametrize("variant", ["av", "video", "audio"])
def test_the_transformer_has_the_tensors_of_the_file(checkpoint, variant):
    model = load(checkpoint, variant)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint.read(DIT + name).float()), name
        assert not parameter.requires_grad
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == {"av": 28, "video": 10, "audio": 10}[variant] * 2
    assert all(output.isfinite().all() and 0.1 < output.std() < 10 for output in velocities(model))


def test_tables_stored_in_float32_stay_float32(checkpoint):
    model = load(checkpoint, dtype=torch.bfloat16)
    expected = checkpoint.entry(f"{DIT}scale_shift_table").dtype
    assert model.scale_shift_table.dtype == expected
    assert model.transformer_blocks[0].scale_shift_table.dtype == expected
    assert model.patchify_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("form", "kind", "error"),
    [
        (WeightFormat("fp8"), Fp8Linear, 0.1),
        (WeightFormat("fp8", fp8_scales="row"), Fp8Linear, 0.1),
        (FP8, Fp8Linear, 0.1),
        (WeightFormat("nf4"), Nf4Linear, 0.35),
    ],
)
def test_weights_are_quantised_while_they_are_read(checkpoint, form, kind, error):
    model = load(checkpoint, weights=form)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    assert {type(layer) for layer in layers.values()} == {kind}
    for name, layer in layers.items():
        weight = checkpoint.read(f"{DIT}{name}.weight")
        if form.kind == "nf4":
            assert torch.equal(layer.weight, nf4.quantise(weight, 32).dense())
        else:
            assert torch.equal(layer.weight, fp8.dequantise(*fp8.quantise(weight, form.fp8_scales), torch.float32))
        assert layer.scale is None or layer.scale.dtype == torch.bfloat16
    for quantised, exact in zip(velocities(model), velocities(load(checkpoint))):
        assert 0 < (quantised - exact).norm() / exact.norm() < error


def test_inputs_that_no_block_divides_keep_their_precision(checkpoint, caplog):
    model = load(checkpoint, weights=WeightFormat("nf4", nf4_block_size=64))
    assert isinstance(model.transformer_blocks[0].attn1.to_q, Nf4Linear)
    assert isinstance(model.transformer_blocks[0].audio_attn1.to_q, DenseLinear)
    assert "32 inputs are no multiple of 64" in caplog.text


@pytest.mark.parametrize("kind", ["scaled", "comfy", "plain"])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_fp8_files(tmp_path, version, kind):
    write_tiny_checkpoint(tmp_path / "fp8.safetensors", version, fp8=kind)
    checkpoint = Checkpoint.open(tmp_path / "fp8.safetensors")
    assert checkpoint.is_fp8
    kept, expanded = load(checkpoint, weights=FP8), load(checkpoint)
    assert isinstance(kept.get_submodule(QUERY), Fp8Linear) and isinstance(expanded.get_submodule(QUERY), DenseLinear)
    codes = checkpoint.read(f"{DIT}{QUERY}.weight")
    end = {"scaled": "weight_scale", "comfy": "scale_weight"}.get(kind)
    scale = 1.0 if end is None else checkpoint.read(f"{DIT}{QUERY}.{end}").float()
    for model in (kept, expanded):
        assert torch.equal(model.get_submodule(QUERY).weight, codes.float() * scale)
    for first, second in zip(velocities(kept), velocities(expanded)):
        assert torch.equal(first, second)
    first_block = kept.transformer_blocks[0].attn1.to_q  # these files keep it in bf16
    assert isinstance(first_block, DenseLinear if kind == "scaled" else Fp8Linear)
    if kind == "scaled" and version == "2.3":  # gates are fp8 in these files, too
        gate = f"{DIT}transformer_blocks.1.attn1.to_gate_logits"
        expected = checkpoint.read(f"{gate}.weight").float() * checkpoint.read(f"{gate}.weight_scale")
        assert torch.equal(kept.transformer_blocks[1].attn1.to_gate_logits.weight, expected)


def test_loras_are_merged_before_quantising(checkpoint):
    seen = []

    def merge(name: str, weight: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return weight.float() + 1 if name == f"{QUERY}.weight" else weight

    model = load(checkpoint, weights=WeightFormat("nf4"), transform=merge)
    merged = (checkpoint.read(f"{DIT}{QUERY}.weight").float() + 1).bfloat16()
    assert torch.equal(model.get_submodule(QUERY).weight, nf4.quantise(merged, 32).dense())
    assert "patchify_proj.weight" in seen and not any(name.endswith("norm.weight") for name in seen)


def test_merging_into_fp8_files_quantises_again_and_says_so(tmp_path, caplog):
    write_tiny_checkpoint(tmp_path / "fp8.safetensors", fp8="comfy")
    checkpoint = Checkpoint.open(tmp_path / "fp8.safetensors")

    def merge(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2 if name == f"{QUERY}.weight" else weight

    plain, merged = load(checkpoint, weights=FP8), load(checkpoint, weights=FP8, transform=merge)
    before, after = plain.get_submodule(QUERY), merged.get_submodule(QUERY)
    assert (after.weight - 2 * before.weight).norm() < 0.05 * after.weight.norm()
    assert after.scale.dim() == 3 and caplog.text.count("a second time") == 1
    other = "transformer_blocks.0.attn1.to_k"
    assert torch.equal(plain.get_submodule(other).codes, merged.get_submodule(other).codes)


def test_other_components(checkpoint):
    pixels = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = load_video_encoder(checkpoint, "cpu", torch.float32)(pixels)
        assert latents.shape == (1, 8, 2, 2, 2)
        assert load_video_decoder(checkpoint, "cpu", torch.float32)(latents).shape == pixels.shape
        sound = load_audio_encoder(checkpoint, "cpu", torch.float32)(torch.randn(1, 2, 17, 64))
        assert sound.shape == (1, 2, 5, 16)
        mel = load_audio_decoder(checkpoint, "cpu", torch.float32)(sound)
        wave = load_vocoder(checkpoint, "cpu")(mel)
    assert wave.shape[:2] == (1, 2) and wave.std() > 1e-3 and wave.abs().max() <= 1
    connectors = load_text_connectors(checkpoint, "cpu", torch.bfloat16, "video")
    assert connectors.audio_embeddings_connector is None
    assert next(connectors.parameters()).dtype == torch.bfloat16
    assert load_text_connectors(checkpoint, "cpu", torch.float32, "av").audio_embeddings_connector is not None


@pytest.mark.parametrize("version", ["20", "23"])
def test_golden_checkpoints_load_without_leftovers(version, caplog):
    checkpoint = Checkpoint.open(GOLDEN / f"tiny_ltx2_{version}.safetensors")
    load(checkpoint)
    load_text_connectors(checkpoint, "cpu", torch.float32)
    assert caplog.records == []


LOADERS = {
    "vae.encoder.": (load_video_encoder, "--vae"),
    "vae.decoder.": (load_video_decoder, "--vae"),
    "audio_vae.encoder.": (load_audio_encoder, "--ltx2_checkpoint"),
    "audio_vae.decoder.": (load_audio_decoder, "--ltx2_checkpoint"),
    "vocoder.": (load_vocoder, "--ltx2_checkpoint"),
    f"{DIT}video_embeddings_connector.": (load_text_connectors, "--ltx2_text_encoder_checkpoint"),
    DIT: (lambda checkpoint, device, dtype: load(checkpoint), "--ltx2_checkpoint"),
}


@pytest.mark.parametrize("prefix", LOADERS)
def test_what_is_missing_is_named_with_its_flag(checkpoint, tmp_path, prefix):
    loader, flag = LOADERS[prefix]
    own = checkpoint.names(prefix)
    others = [name for name in checkpoint.names() if not name.startswith(prefix)]
    for dropped, message in ((own, "missing|no tensors under"), (own[3:4], own[3].removeprefix(prefix))):
        tensors = {name: checkpoint.read(name) for name in (*own, *others) if name not in dropped}
        write_safetensors(tmp_path / "part.safetensors", tensors, checkpoint.metadata)
        with pytest.raises(UserError, match=message) as caught:
            loader(Checkpoint.open(tmp_path / "part.safetensors"), "cpu", torch.float32)
        assert flag in str(caught.value) and "part.safetensors" in str(caught.value)


def test_files_that_do_not_fit_their_config(checkpoint, tmp_path):
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    path = tmp_path / "changed.safetensors"

    def refused(changes: dict[str, torch.Tensor], message: str) -> None:
        write_safetensors(path, tensors | changes, checkpoint.metadata)
        with pytest.raises(UserError, match=message):
            load(Checkpoint.open(path))

    name = f"{DIT}{QUERY}.weight"
    refused({name: torch.zeros(64, 63)}, r"shape \[64, 63\]")
    refused({f"{DIT}transformer_blocks.0.attn9.to_q.weight": torch.zeros(1)}, "attn9")
    refused({name: torch.zeros(64, 64, dtype=torch.int8)}, "nvfp4 or int8")
    refused({f"{DIT}{QUERY}.weight_scale_2": torch.zeros(())}, "nvfp4 or int8")
    codes = tensors[name].to(torch.float8_e4m3fn)
    refused({name: codes, f"{DIT}{QUERY}.weight_scale": torch.ones(3)}, "no scale of a 64 x 64 matrix")


def test_unknown_tensors_outside_blocks_are_listed_once(checkpoint, tmp_path, caplog):
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    write_safetensors(tmp_path / "a.safetensors", tensors | {f"{DIT}extra_table": torch.zeros(1)}, checkpoint.metadata)
    opened = Checkpoint.open(tmp_path / "a.safetensors")
    assert "extra_table" not in opened.component("vocoder")
    load(opened)
    assert caplog.text.count("extra_table") == 1


def test_later_generations_are_refused(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {f"{DIT}proj_out.bias": torch.zeros(1)}, {"model_version": "2.5"})
    with pytest.raises(UserError, match=r"LTX-2\.5"):
        load(Checkpoint.open(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_tiny_checkpoints_have_the_structure_of_the_golden_ones(tmp_path, version):
    write_tiny_checkpoint(tmp_path / "a.safetensors", version, layers=2 if version == "2.0" else 3)
    write_tiny_checkpoint(tmp_path / "b.safetensors", version, layers=2 if version == "2.0" else 3)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    tiny = Checkpoint.open(tmp_path / "a.safetensors")
    golden = Checkpoint.open(GOLDEN / f"tiny_ltx2_{version.replace('.', '')}.safetensors")
    for component in ("transformer", "text", "video_encoder", "video_decoder", "audio_encoder", "audio_decoder"):
        assert set(tiny.component(component)) == set(golden.component(component))
    for component in ("transformer", "text"):
        for name in golden.component(component).values():
            assert (tiny.entry(name).shape, tiny.entry(name).dtype) == (
                golden.entry(name).shape,
                golden.entry(name).dtype,
            )


def _load_everything(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    load(checkpoint)
    for loader in (load_video_encoder, load_video_decoder, load_audio_encoder, load_audio_decoder, load_vocoder):
        loader(checkpoint, "cpu", torch.float32)
    load_text_connectors(checkpoint, "cpu", torch.float32)


def _flip_headers(path: Path, count: int) -> int:
    """Flip one bit of the header `count` times; how often the file was refused. Anything but a UserError passes on."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    chooser = random.Random(0)
    refused = 0
    for _ in range(count):
        flipped = bytearray(content)
        # Half of the flips hit the config, which comes first.
        flipped[chooser.randrange(header if chooser.random() < 0.5 else 5000)] ^= 1 << chooser.randrange(8)
        path.write_bytes(flipped)
        try:
            _load_everything(path)
        except UserError as error:
            refused += 1
            assert path.name in str(error)
    return refused


def test_flipped_headers_give_clean_errors_or_a_model(tmp_path):
    write_tiny_checkpoint(tmp_path / "flipped.safetensors")
    assert _flip_headers(tmp_path / "flipped.safetensors", 20) > 10


@pytest.mark.slow
def test_many_flipped_headers(tmp_path):
    write_tiny_checkpoint(tmp_path / "flipped.safetensors", "2.0")
    assert _flip_headers(tmp_path / "flipped.safetensors", 400) > 200
