"""Loading Gemma: prefixes, inferred config, fp8 scales, damaged files."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ltx2_tuner.checkpoint import SafetensorsFile
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.text_encoding import GemmaOptions, write_tiny_gemma, write_tiny_gemma_file
from ltx2_tuner.text_encoding.encoder import read_gemma_id
from ltx2_tuner.text_encoding.fp8 import Fp8Linear
from ltx2_tuner.text_encoding.gemma import load_gemma, open_gemma
from ltx2_tuner.text_encoding.weights import find_weights, infer_config

LAYERS = 6  # the sixth is the first global one
CPU = torch.device("cpu")
IDS = torch.tensor([[0, 0, 2, 40, 41, 42], [2, 50, 51, 52, 53, 54]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma dir"), layers=LAYERS)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_tiny_gemma_file(tmp_path_factory.mktemp("gemma") / "g.safetensors", layers=LAYERS)


def load(dtype: torch.dtype = torch.float32, **options):
    source = open_gemma(GemmaOptions(**options))
    try:
        return load_gemma(source, CPU, dtype)
    finally:
        source.close()


@torch.no_grad()
def states(model, ids=IDS, mask=MASK):
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return output.hidden_states


def tensors_of(path) -> dict[str, torch.Tensor]:
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


def test_directory_load_is_that_of_transformers(directory):
    prepare_torchaudio()
    from transformers import AutoConfig, Gemma3TextModel

    config = AutoConfig.from_pretrained(directory).text_config
    reference, info = Gemma3TextModel.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        key_mapping={r"^language_model\.model\.": ""},
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    found = states(load(root=directory))
    assert len(found) == LAYERS + 1
    for ours, theirs in zip(found, states(reference)):
        assert torch.equal(ours, theirs)


def test_hidden_states_begin_with_the_embedding_and_end_with_the_norm(directory):
    model = load(root=directory)
    found = states(model)
    assert torch.equal(found[0], model.embed_tokens.weight[IDS] * model.embed_tokens.embed_scale)
    assert torch.equal(found[-1], model(input_ids=IDS, attention_mask=MASK).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_equals_directory(directory, single, dtype):
    ours, theirs = load(dtype, safetensors=single), load(dtype, root=directory)
    for a, b in zip(states(ours), states(theirs)):
        assert torch.equal(a, b)
    assert read_gemma_id(GemmaOptions(safetensors=single)) == read_gemma_id(GemmaOptions(root=directory))


@pytest.mark.parametrize(
    "prefix", ["", "language_model.model.", "model.language_model.", "text_encoders.gemma3.model."]
)
def test_any_prefix_is_found(single, tmp_path, prefix):
    renamed = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else name: value
        for name, value in tensors_of(single).items()
    }
    renamed["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2)
    renamed["lm_head.weight"] = torch.zeros(2)
    path = tmp_path / "renamed.safetensors"
    write_safetensors(path, renamed)
    assert torch.equal(states(load(safetensors=path))[-1], states(load(safetensors=single))[-1])


def test_sharded_directory(directory, tmp_path):
    tensors = tensors_of(directory / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        write_safetensors(tmp_path / shard, {name: tensors[name] for name in members})
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert torch.equal(states(load(root=tmp_path))[-1], states(load(root=directory))[-1])
    assert read_gemma_id(GemmaOptions(root=tmp_path)) == read_gemma_id(GemmaOptions(root=directory))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: no such file"):
        load(root=tmp_path)


def test_buffers_are_real_and_stay_float32(single):
    """Their names change between versions of transformers; only the dtype and place may matter."""
    model = load(torch.bfloat16, safetensors=single)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_global_layers_divide_positions_by_eight(single):
    config = infer_config(find_weights([SafetensorsFile(single)]))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    model = load(safetensors=single)
    scaled = states(model)
    buffers = dict(model.rotary_emb.named_buffers())
    for name, buffer in buffers.items():
        if name.startswith("full_attention") and name.endswith("inv_freq"):
            buffer.mul_(8)
    unscaled = states(model)
    assert torch.equal(scaled[LAYERS - 1], unscaled[LAYERS - 1])
    assert (scaled[LAYERS] - unscaled[LAYERS]).abs().max() > 1e-3


def test_one_billion_gemma_has_no_scaling(tmp_path):
    path = write_tiny_gemma_file(tmp_path / "g.safetensors", hidden=1152, layers=1)
    config = infer_config(find_weights([SafetensorsFile(path)]))
    assert "rope_scaling" not in config and config["sliding_window"] == 512


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("scale", ["tensor", "row", "legacy", "none"])
def test_fp8_stays_fp8_and_close(single, tmp_path, scale, offload):
    path = write_tiny_gemma_file(tmp_path / "fp8.safetensors", fp8=True, scale=scale, layers=LAYERS)
    model = load(torch.bfloat16, safetensors=path, fp8_weight_offload=offload)
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 7 * LAYERS
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    valid = MASK.bool()
    for ours, exact in zip(states(model), states(load(safetensors=single))):
        assert cosine_similarity(ours[valid].float(), exact[valid], dim=-1).min() > 0.97


def test_fp8_scale_is_exact():
    weight = torch.randn(6, 4).to(torch.float8_e4m3fn)
    scale = torch.rand(6, 1) + 0.5
    x = torch.randn(3, 4)
    layer = Fp8Linear(weight, scale, CPU, offload=True)
    assert torch.equal(layer(x), x @ (weight.float() * scale).T)


@pytest.mark.parametrize("side", ["weight_scale_2", "weight"])
def test_packed_fp4_is_refused(single, tmp_path, side):
    tensors = tensors_of(single)
    layer = "model.layers.0.mlp.up_proj"
    if side == "weight":
        tensors[f"{layer}.weight"] = torch.zeros(64, 24, dtype=torch.uint8)
    else:
        tensors[f"{layer}.weight_scale_2"] = torch.ones(1)
    path = tmp_path / "fp4.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(UserError, match=r"fp4.safetensors: is packed to 4 or 8 bit integers .*up_proj"):
        load(safetensors=path)


def test_block_scales_are_refused(tmp_path):
    path = write_tiny_gemma_file(tmp_path / "g.safetensors", fp8=True)
    tensors = tensors_of(path)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(2, 3)
    write_safetensors(path, tensors)
    with pytest.raises(UserError, match="a block-wise scale"):
        load(safetensors=path)


def change(path, drop: str = "", **values: torch.Tensor) -> None:
    tensors = {name: value for name, value in tensors_of(path).items() if name != drop}
    write_safetensors(path, {**tensors, **{name.replace("__", "."): value for name, value in values.items()}})


@pytest.mark.parametrize("source", ["root", "safetensors"])
def test_missing_weights_are_named(tmp_path, source):
    path = write_tiny_gemma(tmp_path) if source == "root" else write_tiny_gemma_file(tmp_path / "g.safetensors")
    file = path / "model.safetensors" if source == "root" else path
    prefix = "language_model.model." if source == "root" else "model."
    change(file, drop=f"{prefix}layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match=rf"lacks {prefix}layers.1.mlp.up_proj.weight; give a complete Gemma 3"):
        load(**{source: path})


def test_other_shapes_and_other_models_are_refused(tmp_path):
    path = write_tiny_gemma_file(tmp_path / "g.safetensors")
    change(path, model__layers__1__mlp__up_proj__weight=torch.zeros(64, 40))
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has the shape \[64, 40\], but needs \[64, 48\]"):
        load(safetensors=path)
    other = tmp_path / "other.safetensors"
    write_safetensors(other, {"decoder.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"other.safetensors: has no tensor named ...embed_tokens.weight"):
        load(safetensors=other)
    folder = write_tiny_gemma(tmp_path / "folder")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert model; give the folder of a Gemma 3 model"):
        load(root=folder)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"--gemma_root .*nowhere: no such directory"):
        load(root=tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no config"):
        load(root=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(UserError, match="names files outside of its folder"):
        load(root=tmp_path)


@pytest.mark.parametrize("kind", ["root", "safetensors"])
def test_cut_or_damaged_files_are_named(tmp_path, kind):
    """Never a traceback, never a silent load: 20 cuts and 20 flipped bits of the header."""
    path = write_tiny_gemma(tmp_path) if kind == "root" else write_tiny_gemma_file(tmp_path / "g.safetensors")
    file = path / "model.safetensors" if kind == "root" else path
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for cut in [*range(10), *(draw.randrange(len(whole)) for _ in range(10))]:
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"\.safetensors"):
            load(**{kind: path})
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[draw.randrange(header)] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            load(**{kind: path})
        except UserError as error:
            assert file.name in str(error) or str(path) in str(error)


def test_tiny_files_depend_on_their_arguments_alone(tmp_path):
    first, second = (write_tiny_gemma(tmp_path / name) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    files = [write_tiny_gemma_file(tmp_path / f"{name}.safetensors", fp8=True) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_gemma_id(GemmaOptions(root=first)) != read_gemma_id(
        GemmaOptions(root=write_tiny_gemma(tmp_path / "c", seed=1))
    )
