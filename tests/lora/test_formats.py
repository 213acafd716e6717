"""Every format in and out, name tables, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.files import comfy_path, load_lora, read_tensors, save_comfy, save_original
from ltx2_tuner.lora.formats import LoRAMatrices, comfy_metadata, parse, to_comfy, to_diffusers, to_original
from ltx2_tuner.lora.names import NameTable, comfy_name, diffusers_name, kohya_name, static_paths
from ltx2_tuner.lora.targets import linear_layers
from tests.lora.toy import ToyTransformer

WRITERS = {"original": to_original, "comfy": to_comfy, "diffusers": to_diffusers}


def matrices(paths, dtype=torch.float32) -> dict[str, LoRAMatrices]:
    """Random adapters of differing ranks with alpha unlike the rank."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for index, path in enumerate(paths):
        rank = 1 + index % 5
        down, up = torch.randn(rank, 6, generator=generator), torch.randn(4, rank, generator=generator)
        modules[path] = LoRAMatrices(down.to(dtype), up.to(dtype), 0.75 * rank + 1)
    return modules


def assert_same_deltas(got, wanted, tolerance=1e-5):
    assert got.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(got[path].delta(), wanted[path].delta(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("exact", [True, False])
def test_all_spellings_of_all_layers_resolve(exact):
    paths = [path for path, _ in linear_layers(ToyTransformer(12))]
    table = NameTable(paths, exact=True) if exact else NameTable.static()
    for path in paths:
        flat = path.replace(".", "_")
        for name in (
            path,
            kohya_name(path),
            comfy_name(path),
            diffusers_name(path),
            "lora_unet_" + flat,
            "model.diffusion_model." + path,
            "base_model.model." + path,
        ):
            assert table.resolve(name) == path


def test_real_names():
    path = "transformer_blocks.47.audio_ff.net.0.proj"
    assert kohya_name(path) == "lora_unet_model_transformer_blocks_47_audio_ff_net_0_proj"
    assert comfy_name(path) == "diffusion_model.transformer_blocks.47.audio_ff.net.0.proj"
    video = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"
    assert kohya_name(video) == "lora_unet_embeddings_connector_transformer_1d_blocks_0_attn1_to_q"
    assert diffusers_name(video) == "connectors.video_connector.transformer_blocks.0.attn1.to_q"
    assert diffusers_name("audio_patchify_proj") == "transformer.audio_proj_in"
    assert diffusers_name("av_ca_a2v_gate_adaln_single.linear") == "transformer.av_cross_attn_video_a2v_gate.linear"
    assert diffusers_name("prompt_adaln_single.linear") == "transformer.prompt_adaln.linear"


def test_flat_names_of_the_static_list_are_unambiguous():
    for rename in (kohya_name, comfy_name, diffusers_name):
        assert len({rename(path) for path in static_paths()}) == len(static_paths())


def test_a_models_own_table_knows_its_depth():
    table = NameTable([path for path, _ in linear_layers(ToyTransformer(2))], exact=True)
    assert table.resolve("transformer_blocks.1.attn1.to_q") is not None
    assert table.resolve("transformer_blocks.2.attn1.to_q") is None


@pytest.mark.parametrize("route", [("original", "comfy", "diffusers", "original"), ("diffusers", "original", "comfy")])
def test_round_trip_keeps_every_delta(route):
    wanted = modules = matrices(static_paths())
    for target in route:
        tensors = WRITERS[target](modules)
        found = parse(tensors)
        assert found.format == target and not found.unknown and not found.lonely
        if target != "original":
            assert not any("alpha" in key for key in tensors) and all("lora" in key for key in tensors)
        modules = found.modules
    assert_same_deltas(modules, wanted)


def test_original_keeps_alpha_and_casts_it():
    modules = matrices(["transformer_blocks.0.attn1.to_q"])
    state = to_original(modules, torch.bfloat16)
    alpha = state["lora_unet_model_transformer_blocks_0_attn1_to_q.alpha"]
    assert alpha.dtype == torch.bfloat16 and alpha.shape == () and alpha.item() == 1.75
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_folding_happens_in_float32_before_rounding():
    up = torch.randn(4, 2)
    modules = {"transformer_blocks.0.attn1.to_q": LoRAMatrices(torch.randn(2, 6), up, 0.6)}
    state = to_comfy(modules, torch.bfloat16)
    assert torch.equal(state["diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight"], (up * 0.3).bfloat16())


def test_stored_alpha_of_a_comfy_file_counts():
    tensors = to_comfy(matrices(["transformer_blocks.0.attn1.to_q"]))
    tensors["diffusion_model.transformer_blocks.0.attn1.to_q.alpha"] = torch.tensor(0.5)
    assert parse(tensors).modules["transformer_blocks.0.attn1.to_q"].alpha == 0.5


@pytest.mark.parametrize(
    "suffixes", [("lora_A.default.weight", "lora_B.default.weight"), ("lora.down.weight", "lora.up.weight")]
)
def test_peft_and_older_suffixes(suffixes):
    tensors = {
        f"transformer.transformer_blocks.0.attn1.to_out.0.{suffixes[0]}": torch.ones(2, 6),
        f"transformer.transformer_blocks.0.attn1.to_out.0.{suffixes[1]}": torch.ones(4, 2),
    }
    assert parse(tensors).modules.keys() == {"transformer_blocks.0.attn1.to_out.0"}


def test_unknown_and_lonely_names_are_listed():
    tensors = to_original(matrices(["transformer_blocks.0.attn1.to_q"]))
    tensors |= {"lora_unet_single_blocks_3_linear.lora_down.weight": torch.ones(2, 6)}
    tensors |= {"lora_unet_single_blocks_4_linear.lora_down.weight": torch.ones(2, 6)}
    tensors |= {"lora_unet_single_blocks_4_linear.lora_up.weight": torch.ones(6, 2)}
    found = parse(tensors)
    assert found.unknown == ("lora_unet_single_blocks_4_linear",)
    assert found.lonely == ("lora_unet_single_blocks_3_linear",)


@pytest.mark.parametrize(
    "key", ["dora_scale", "lokr_w1", "lokr_w2_a", "lora_magnitude_vector.weight", "hada_w1_a", "oft_R.weight"]
)
def test_other_kinds_of_adapters_are_refused(key):
    tensors = to_comfy(matrices(["transformer_blocks.0.attn1.to_q"]))
    tensors[f"diffusion_model.transformer_blocks.0.attn1.to_q.{key}"] = torch.ones(2)
    with pytest.raises(UserError, match="made by another network module"):
        parse(tensors)


@pytest.mark.parametrize(("down", "up"), [((2, 6), (4, 3)), ((2, 6, 1), (4, 2)), ((0, 6), (4, 0))])
def test_matrices_that_do_not_fit_are_refused(down, up):
    name = "lora_unet_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}
    with pytest.raises(UserError, match="do not fit together"):
        parse(tensors, source="x.safetensors")


def test_the_same_layer_twice_is_refused():
    tensors = to_original(matrices(["transformer_blocks.0.attn1.to_q"]))
    tensors |= {key.replace("lora_unet_model_", "lora_unet_"): value for key, value in tensors.items()}
    with pytest.raises(UserError, match="two of its modules"):
        parse(tensors)


def test_a_file_without_lora_keys_is_refused():
    with pytest.raises(UserError, match="no LoRA matrices"):
        parse({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, source="model.safetensors")
    layer = {
        f"model.diffusion_model.transformer_blocks.0.attn1.to_q.{name}": torch.ones(2) for name in ("bias", "weight")
    }
    with pytest.raises(UserError, match="no LoRA matrices among its 2 tensors"):
        parse(layer, source="model.safetensors")


def test_files_are_deterministic_and_carry_metadata(tmp_path):
    modules = matrices(["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"])
    metadata = {"ss_network_dim": "4", "ss_reference_downscale_factor": "2"}
    first, second = tmp_path / "ä b.safetensors", tmp_path / "b.safetensors"
    for path in (first, second):
        save_original(path, dict(reversed(modules.items())) if path is second else modules, metadata, torch.float32)
    assert first.read_bytes() == second.read_bytes()
    found = load_lora(first)
    assert found.metadata == metadata and found.format == "original"
    assert_same_deltas(found.modules, modules, 1e-6)
    assert comfy_path(first).name == "ä b.comfy.safetensors"
    save_comfy(comfy_path(first), modules, metadata)
    plain = {"reference_downscale_factor": "2", "reference_spatial_scale_factor": "2"}
    assert load_lora(comfy_path(first)).metadata == {**metadata, **plain}


@pytest.mark.parametrize("factor", ["1", "None"])
def test_a_reference_factor_of_one_gets_no_plain_key(factor):
    assert "reference_downscale_factor" not in comfy_metadata({"ss_reference_downscale_factor": factor})


def test_cut_and_damaged_files_name_themselves(tmp_path):
    path = tmp_path / "a.safetensors"
    save_original(path, matrices(["transformer_blocks.0.attn1.to_q"]), {})
    whole = path.read_bytes()
    for cut in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.safetensors"):
            load_lora(path)


def test_flipped_header_bits_never_escape_as_other_errors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_original(path, matrices(["transformer_blocks.0.attn1.to_q"]), {})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, header, max(1, header // 40)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        try:
            load_lora(path)
        except UserError as error:
            assert "a.safetensors" in str(error)


def test_missing_and_pickled_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no readable safetensors file"):
        read_tensors(tmp_path / "x.pt")
