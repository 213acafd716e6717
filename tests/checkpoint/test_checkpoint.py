"""Names, configs and versions of the files in circulation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, check_version, component_id, write_tiny_checkpoint
from ltx2_tuner.checkpoint.checkpoint import parse_model_version
from ltx2_tuner.checkpoint.keys import canonical_names
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.models.transformer import TransformerConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
DIT = "model.diffusion_model."


@pytest.fixture(params=["2.0", "2.3"])
def golden(request) -> Checkpoint:
    return Checkpoint.open(GOLDEN / f"tiny_ltx2_{request.param.replace('.', '')}.safetensors")


def tensors_of(checkpoint: Checkpoint, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.names(prefix)}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (f"{DIT}patchify_proj.weight", f"{DIT}patchify_proj.weight"),
        ("diffusion_model.proj_out.bias", f"{DIT}proj_out.bias"),
        ("transformer.transformer_blocks.0.attn1.to_q.weight", f"{DIT}transformer_blocks.0.attn1.to_q.weight"),
        ("transformer_blocks.0.attn1.to_q.weight", f"{DIT}transformer_blocks.0.attn1.to_q.weight"),
        ("model.av_ca_a2v_gate_adaln_single.linear.bias", f"{DIT}av_ca_a2v_gate_adaln_single.linear.bias"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("embeddings_connector.learnable_registers", f"{DIT}video_embeddings_connector.learnable_registers"),
        (
            f"{DIT}audio_embeddings_connector.learnable_registers",
            f"{DIT}audio_embeddings_connector.learnable_registers",
        ),
        (f"{DIT}text_embedding_projection.aggregate_embed.weight", "text_embedding_projection.aggregate_embed.weight"),
        ("vocoder.vocoder.conv_pre.weight", "vocoder.vocoder.conv_pre.weight"),
        ("encoder.conv_in.conv.weight", "vae.encoder.conv_in.conv.weight"),
        (f"{DIT}scaled_fp8", f"{DIT}scaled_fp8"),
    ],
)
def test_prefixes_are_normalised(name, canonical):
    assert canonical_names([name]) == {name: canonical}


def test_bare_video_vae_names_mean_nothing_beside_prefixed_ones():
    names = canonical_names(["vae.encoder.conv_in.conv.bias", "encoder.conv_in.conv.bias"])
    assert names["encoder.conv_in.conv.bias"] == "encoder.conv_in.conv.bias"


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    one = torch.zeros(1)
    write_safetensors(tmp_path / "a.safetensors", {f"{DIT}proj_out.bias": one, "diffusion_model.proj_out.bias": one})
    with pytest.raises(UserError, match="under two prefixes"):
        Checkpoint.open(tmp_path / "a.safetensors")


def test_versions_and_their_markers(golden):
    newer = "23" in golden.path.name
    assert golden.version == ("2.3" if newer else "2.0")
    assert ("vocoder.bwe" in golden.version_markers) is newer
    assert not golden.is_fp8 and not golden.is_nf4


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_config_of_a_file_without_metadata_equals_that_of_its_metadata(tmp_path, version):
    """Heads show in the gates of 2.3 files, 2.0 files have 32; the text width shows in the projections of 2.0."""
    sizes = {"heads": 32 if version == "2.0" else 4, "head_dim": 4, "audio_head_dim": 2, "layers": 3}
    write_tiny_checkpoint(tmp_path / "full.safetensors", version, **sizes)
    write_tiny_checkpoint(tmp_path / "bare.safetensors", version, metadata=False, **sizes)
    full, bare = (Checkpoint.open(tmp_path / f"{name}.safetensors") for name in ("full", "bare"))
    assert bare.version == full.version == version
    expected = TransformerConfig.from_dict(full.config["transformer"])
    found = TransformerConfig.from_dict(bare.config["transformer"])
    captions = expected.caption_channels if version == "2.0" else found.caption_channels
    assert found == dataclasses.replace(expected, caption_channels=captions)
    assert found.gate_timestep_scale == 1000 and found.double_precision_frequencies
    assert bare.config["vae"]["latent_channels"] == 8
    assert ("bwe" in bare.config["vocoder"]) is (version == "2.3")


def test_weights_stand_in_for_flags_that_the_config_lacks(golden, tmp_path):
    config = json.loads(golden.metadata["config"])
    for key in list(config["transformer"]):
        if key.startswith(("cross_attention_adaln", "apply_gated", "caption_proj")):
            del config["transformer"][key]
    write_safetensors(tmp_path / "a.safetensors", tensors_of(golden), {"config": json.dumps(config)})
    transformer = Checkpoint.open(tmp_path / "a.safetensors").config["transformer"]
    newer = golden.version == "2.3"
    assert transformer["apply_gated_attention"] is newer and transformer["cross_attention_adaln"] is newer
    assert transformer.get("caption_proj_before_connector", False) is newer


def test_components_of_separate_files(golden, tmp_path):
    transformer = {name.removeprefix(DIT): tensor for name, tensor in tensors_of(golden, DIT).items()}
    vae = {name.removeprefix("vae."): tensor for name, tensor in tensors_of(golden, "vae.").items()}
    rest = tensors_of(golden, "audio_vae.") | tensors_of(golden, "vocoder.") | tensors_of(golden, "text_")
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for path, tensors in zip(paths, (transformer, vae, rest)):
        write_safetensors(path, tensors, {"config": golden.metadata["config"]} if path == paths[0] else None)
    union = Checkpoint.open(*paths)
    assert set(union.names()) == set(golden.names())
    for component in ("video_encoder", "audio_encoder", "text", "vocoder", "transformer"):
        assert union.component(component) == golden.component(component)
        assert component_id(union, component) == component_id(golden, component)


def test_version_check(golden, caplog):
    other = "2.0" if golden.version == "2.3" else "2.3"
    assert check_version(golden, None, "error") == golden.version
    assert check_version(golden, golden.version, "error") == golden.version
    assert check_version(golden, other, "off") == other and not caplog.records
    assert check_version(golden, other, "warn") == other
    assert golden.version in caplog.text and other in caplog.text
    with pytest.raises(UserError, match=rf"--ltx_version {golden.version}"):
        check_version(golden, other, "error")


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.3.rc1", (2, 3)), ("2.4-rc2", (2, 4)), ("2.0.0", (2, 0, 0)), ("", ()), ("dev", ()), ("2.³", (2,))],
)
def test_model_versions(text, version):
    assert parse_model_version(text) == version


def test_later_generations_are_recognised(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"model_version": "2.5.1"})
    assert Checkpoint.open(tmp_path / "a.safetensors").version == "2.5"


@pytest.mark.parametrize("config", ["not json", "[1]", "[" * 100_000])
def test_a_damaged_config_is_not_taken_for_a_missing_one(tmp_path, config):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"config": config})
    with pytest.raises(UserError, match=r"a\.safetensors: its config is damaged"):
        Checkpoint.open(tmp_path / "a.safetensors")


def test_files_of_other_models_open_without_sections(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"config": '{"transformer": 3}'})
    assert Checkpoint.open(tmp_path / "a.safetensors").config == {}


def test_ids_name_the_weights_of_one_component(tmp_path):
    write_tiny_checkpoint(tmp_path / "a.safetensors", "2.3")
    write_tiny_checkpoint(tmp_path / "fp8.safetensors", "2.3", fp8="scaled")
    write_tiny_checkpoint(tmp_path / "b.safetensors", "2.3", seed=1)
    first, fp8, other = (Checkpoint.open(tmp_path / f"{name}.safetensors") for name in ("a", "fp8", "b"))
    for component in ("video_encoder", "audio_encoder", "text"):
        assert len(component_id(first, component)) == 16
        assert component_id(first, component) == component_id(fp8, component) != component_id(other, component)
    assert component_id(first, "transformer") != component_id(fp8, "transformer")


def test_statistics_that_nothing_reads_do_not_count(golden, tmp_path):
    tensors = tensors_of(golden) | {"vae.per_channel_statistics.channel": torch.zeros(8)}
    write_safetensors(tmp_path / "a.safetensors", tensors, golden.metadata)
    again = Checkpoint.open(tmp_path / "a.safetensors")
    assert component_id(again, "video_encoder") == component_id(golden, "video_encoder")
