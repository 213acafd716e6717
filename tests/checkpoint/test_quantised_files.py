"""Pre-quantised files, LoftQ side files, AWQ, and the flags that go with them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, SafetensorsFile, load_transformer, write_tiny_checkpoint
from ltx2_tuner.checkpoint.awq_calibration import awq_scales
from ltx2_tuner.checkpoint.base_model import load_base_model
from ltx2_tuner.checkpoint.loftq_file import load_loftq, loftq_path, save_loftq
from ltx2_tuner.checkpoint.precision import PrecisionOptions, check, effective_format
from ltx2_tuner.checkpoint.quantise_file import quantise_checkpoint
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.quantization import Nf4Linear, nf4
from ltx2_tuner.quantization.formats import WeightFormat

ROOT = Path(__file__).parents[2]
DIT = "model.diffusion_model."
CPU = torch.device("cpu")
NF4 = WeightFormat("nf4")
LAYER = "transformer_blocks.1.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """original, nf4 and fp8 files; start values of rank 4 beside the nf4 file."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(folder / "original.safetensors")
    write_tiny_checkpoint(folder / "fp8.safetensors", fp8="scaled")
    source, target = folder / "original.safetensors", folder / "nf4.safetensors"
    assert quantise_checkpoint(source, target, loftq_rank=4, progress=False)
    return folder


def open_(folder, name: str) -> Checkpoint:
    return Checkpoint.open(folder / f"{name}.safetensors")


def load(checkpoint: Checkpoint, form: WeightFormat = NF4, variant: str = "av"):
    return load_transformer(checkpoint, variant, "cpu", torch.float32, weights=form, progress=False)


def base(checkpoint: Checkpoint, **options):
    precision = PrecisionOptions(NF4, **options)
    return load_base_model(checkpoint, "av", CPU, torch.float32, precision, progress=False)


@pytest.mark.parametrize("variant", ["av", "video", "audio"])
def test_a_quantised_file_equals_quantising_at_load(folder, variant):
    at_load, from_file = load(open_(folder, "original"), variant=variant), load(open_(folder, "nf4"), variant=variant)
    first, second = at_load.state_dict(), from_file.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


def test_layout_of_a_quantised_file(folder):
    before, after = (SafetensorsFile(folder / f"{name}.safetensors") for name in ("original", "nf4"))
    assert after.metadata == before.metadata | {"nf4_quantized": "true", "nf4_block_size": "32"}
    weight = f"{DIT}{LAYER}.weight"
    assert (after.tensors[weight].dtype, after.tensors[weight].shape) == (torch.uint8, (64, 32))
    scale = after.tensors[f"{DIT}{LAYER}.scale_weight"]
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (64, 2, 1))
    assert after.read(f"{DIT}{LAYER}.nf4_shape").tolist() == [64, 64]
    extra = {name for name in after.tensors if name.endswith((".scale_weight", ".nf4_shape"))}
    assert set(after.tensors) - extra == set(before.tensors) and len(extra) == 2 * 2 * 28
    for name in set(before.tensors):
        if after.tensors[name].dtype != torch.uint8:
            assert torch.equal(before.read(name), after.read(name)), name


def test_output_is_the_same_every_time(folder, tmp_path):
    quantise_checkpoint(folder / "original.safetensors", tmp_path / "again.safetensors", progress=False)
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "nf4.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_input_prefixes_are_kept(folder, tmp_path):
    original = open_(folder, "original")
    bare = {name.removeprefix(DIT): original.read(name) for name in original.names(DIT)}
    write_safetensors(tmp_path / "bare.safetensors", bare)
    quantise_checkpoint(tmp_path / "bare.safetensors", tmp_path / "nf4.safetensors", progress=False)
    assert f"{LAYER}.scale_weight" in SafetensorsFile(tmp_path / "nf4.safetensors").tensors
    assert isinstance(load(Checkpoint.open(tmp_path / "nf4.safetensors")).get_submodule(LAYER), Nf4Linear)


def test_inputs_that_are_not_quantised(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert not quantise_checkpoint(folder / "nf4.safetensors", tmp_path / "a.safetensors")
    assert "nf4 already" in caplog.text
    with pytest.raises(UserError, match="fp8 checkpoint"):
        quantise_checkpoint(folder / "fp8.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the input itself"):
        quantise_checkpoint(folder / "original.safetensors", folder / "original.safetensors")
    write_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="no transformer blocks"):
        quantise_checkpoint(tmp_path / "other.safetensors", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_the_files_own_block_size_wins(folder, tmp_path):
    quantise_checkpoint(folder / "original.safetensors", tmp_path / "b16.safetensors", block_size=16, progress=False)
    checkpoint = Checkpoint.open(tmp_path / "b16.safetensors")
    assert effective_format(checkpoint, NF4, CPU).nf4_block_size == 16
    weight = open_(folder, "original").read(f"{DIT}{LAYER}.weight")
    assert torch.equal(load(checkpoint).get_submodule(LAYER).weight, nf4.quantise(weight, 16).dense())


def residuals(folder, model, start_values) -> tuple[float, float]:
    """Summed distance to the original weights without and with the start values, all layers."""
    original, without, with_values = open_(folder, "original"), 0.0, 0.0
    for layer, (down, up) in start_values.items():
        residual = original.read(f"{DIT}{layer}.weight").float() - model.get_submodule(layer).weight
        without += residual.norm().item()
        with_values += (residual - up @ down).norm().item()
    return without, with_values


def test_start_values_make_up_for_the_base_at_load_and_from_the_file(folder):
    at_load = base(open_(folder, "original"), loftq_rank=4, loftq_iterations=2)
    from_file = base(open_(folder, "nf4"), loftq_rank=4)
    one_round = base(open_(folder, "original"), loftq_rank=4, loftq_iterations=1)
    for model in (at_load, from_file, one_round):
        assert len(model.start_values) == 56
        without, with_values = residuals(folder, model.transformer, model.start_values)
        assert with_values < 0.9 * without
    plain, moved = (model.transformer.get_submodule(LAYER).codes for model in (from_file, at_load))
    assert not torch.equal(plain, moved)  # the base follows the iterations
    for layer, (down, up) in from_file.start_values.items():
        assert torch.equal(down, one_round.start_values[layer][0]) and torch.equal(up, one_round.start_values[layer][1])


def test_only_adapted_layers_get_start_values(folder):
    for name in ("original", "nf4"):
        precision = PrecisionOptions(NF4, loftq_rank=4)
        model = load_base_model(
            open_(folder, name), "av", CPU, torch.float32, precision, adapted=LAYER.__eq__, progress=False
        )
        assert list(model.start_values) == [LAYER]


def test_side_file_names_and_refusals(folder, tmp_path):
    path = loftq_path(folder / "nf4.safetensors", 4)
    assert path == folder / "nf4.loftq_r4.safetensors"
    with SafetensorsFile(path) as file:
        assert file.metadata == {
            "loftq_rank": "4",
            "loftq_iters": "2",
            "nf4_block_size": "32",
            "num_modules": "56",
        }
        assert "lora_unet_model_transformer_blocks_0_attn1_to_out_0.lora_A" in file.tensors
    with pytest.raises(UserError, match=r"found nf4\.loftq_r4\.safetensors instead.*--network_dim 8"):
        base(open_(folder, "nf4"), loftq_rank=8)
    other = loftq_path(folder / "nf4.safetensors", 16)
    save_loftq(other, load_loftq(path, [LAYER], 4), rank=32, iterations=1, block_size=32)
    with pytest.raises(UserError, match="found start values for rank 32, --network_dim is 16"):
        load_loftq(other, [LAYER], 16)
    other.unlink()
    with pytest.raises(UserError, match="none of its start values"):
        load_loftq(path, ["elsewhere"], 4)


def test_either_spelling_of_the_names_is_read(tmp_path):
    factors = (torch.ones(2, 3), torch.ones(5, 2))
    name = "lora_unet_transformer_blocks_0_ff_net_2"
    write_safetensors(tmp_path / "a.safetensors", {f"{name}.lora_A": factors[0], f"{name}.lora_B": factors[1]})
    found = load_loftq(tmp_path / "a.safetensors", ["transformer_blocks.0.ff.net.2"], 2)
    assert torch.equal(found["transformer_blocks.0.ff.net.2"][1], factors[1])


def test_awq_calibrates_every_layer_and_keeps_the_scales(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((folder / "original.safetensors").read_bytes())
    checkpoint = Checkpoint.open(path)
    scales = awq_scales(checkpoint, "av", CPU, torch.float32, 0.25, 4)
    assert len(scales) == 56 and all(scale.shape[0] % 32 == 0 for scale in scales.values())
    kept = path.with_name("model.awq_scales.safetensors")
    written = kept.stat().st_mtime_ns
    again = awq_scales(checkpoint, "av", CPU, torch.float32, 0.25, 4)
    assert kept.stat().st_mtime_ns == written and all(torch.equal(again[name], scales[name]) for name in scales)
    assert not torch.equal(
        awq_scales(checkpoint, "av", CPU, torch.float32, 0.5, 4)[f"{LAYER}.weight"], again[f"{LAYER}.weight"]
    )

    model = base(checkpoint, awq_alpha=0.25, awq_batches=4).transformer
    layer, weight = model.get_submodule(LAYER), checkpoint.read(f"{DIT}{LAYER}.weight").float()
    expected = nf4.quantise(weight * scales[f"{LAYER}.weight"], 32, torch.bfloat16).dense() / scales[f"{LAYER}.weight"]
    assert torch.equal(layer.weight, expected)
    both = base(checkpoint, awq_alpha=0.25, awq_batches=4, loftq_rank=4, loftq_iterations=1)
    without, with_values = residuals(folder, both.transformer, both.start_values)
    assert with_values < 0.9 * without


def test_flags_against_checkpoints(folder, caplog):
    original, quantised, fp8 = (open_(folder, name) for name in ("original", "nf4", "fp8"))
    plain_fp8, scaled_fp8 = WeightFormat("fp8", fp8_scales="none"), WeightFormat("fp8")
    for checkpoint, form in ((original, WeightFormat()), (original, scaled_fp8), (quantised, NF4), (fp8, plain_fp8)):
        check(checkpoint, PrecisionOptions(form), device_memory=24 << 30)
    assert caplog.records == []
    check(original, PrecisionOptions(plain_fp8))
    assert "--fp8_scaled" in caplog.text
    for checkpoint, options, message in (
        (fp8, PrecisionOptions(scaled_fp8), "drop --fp8_scaled"),
        (fp8, PrecisionOptions(), "add --fp8_base"),
        (quantised, PrecisionOptions(), "add --nf4_base"),
        (quantised, PrecisionOptions(scaled_fp8), "add --nf4_base"),
        (quantised, PrecisionOptions(NF4, awq_alpha=0.25), "--awq_calibration"),
    ):
        with pytest.raises(UserError, match=message):
            check(checkpoint, options, device_memory=24 << 30)
    caplog.clear()
    check(fp8, PrecisionOptions(), device_memory=80 << 30)
    assert "add --fp8_base" in caplog.text
    check(fp8, PrecisionOptions(NF4), device_memory=24 << 30)
    assert "rounded twice" in caplog.text


def test_fp8_products_fall_back_where_there_are_none(folder, caplog):
    caplog.set_level(logging.INFO)
    form = WeightFormat("fp8", fp8_scales="row", fp8_compute=True, keep_transposed=True)
    found = effective_format(open_(folder, "original"), form, CPU)
    assert not found.fp8_compute and not found.keep_transposed and "--fp8_compute" in caplog.text


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "ltx2_quantize_model.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_script(folder, tmp_path):
    source, target = folder / "original.safetensors", tmp_path / "out dir" / "nf4.safetensors"
    result = run(
        "--input_model", source, "--output_model", target, "--calc_device", "cpu", "--loftq_init", "--network_dim", 4
    )
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == (folder / "nf4.safetensors").read_bytes()
    assert (target.parent / "nf4.loftq_r4.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nf4_block_size", 24], "power of two"),
        (["--loftq_init"], "--network_dim"),
        (["--network_dim", 8], "--loftq_init"),
        (["--loftq_iters", 0], "at least 1"),
    ],
)
def test_misuse_of_the_script(folder, tmp_path, capsys, arguments, message):
    from ltx2_tuner.cli.ltx2_quantize_model import main

    files = ["--input_model", str(folder / "original.safetensors"), "--output_model", str(tmp_path / "a.safetensors")]
    assert main([*files, *map(str, arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
