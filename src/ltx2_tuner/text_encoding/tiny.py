"""A random Gemma 3 of a few kilobytes, for tests and dry runs without the real 24 GB."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx2_tuner.files import write_json, write_safetensors

_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids as in Gemma's vocabulary
_LINES = (
    "a cat walks through the snow while the wind howls in the trees",
    "close-up of a red fox, soft light, 35mm film, shallow depth of field",
    "two people talk in a café; a train passes with a loud whistle",
    "the camera pans slowly over mountains at dawn, birds sing",
)
_VOCABULARY = 512
_HEADS, _KV_HEADS, _HEAD_DIM, _INNER = 4, 2, 16, 64


def write_tiny_gemma(directory: str | Path, seed: int = 0, hidden: int = 48, layers: int = 3) -> Path:
    """Write a directory usable as --gemma_root: config, bf16 weights in the layout of the hub, tokenizer.json.

    Equal arguments give equal bytes. Needs no network.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"language_model.model.{name}": value for name, value in _weights(seed, hidden, layers).items()}
    # What a text encoder has to leave alone.
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    tensors["multi_modal_projector.mm_input_projection_weight"] = torch.ones(8, 8, dtype=torch.bfloat16)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", _config(hidden, layers))
    write_json(directory / "tokenizer.json", json.loads(_tokenizer().to_str()))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", **special}
    write_json(directory / "tokenizer_config.json", settings)
    return directory


def write_tiny_gemma_file(
    path: str | Path,
    fp8: bool = False,
    *,
    scale: str = "tensor",
    tokenizer: str | None = "spiece_model",
    seed: int = 0,
    hidden: int = 48,
    layers: int = 3,
) -> Path:
    """Write a single file usable as --gemma_safetensors, with the weights of `write_tiny_gemma`.

    Args:
        fp8: store the linear layers as float8_e4m3fn.
        scale: with fp8: `tensor` (weight_scale and comfy_quant), `row` (weight_scale per row), `legacy` (scale_weight
            and the marker scaled_fp8) or `none` (plain cast of everything, embedding and norms included).
        tokenizer: name of the tokenizer tensor: `spiece_model`, `tokenizer_json` or None.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in _weights(seed, hidden, layers).items():
        tensors.update(_stored(f"model.{name}", value, scale) if fp8 else {f"model.{name}": value})
    if fp8 and scale == "legacy":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if tokenizer is not None:
        data = _sentencepiece() if tokenizer == "spiece_model" else _tokenizer().to_str().encode()
        tensors[tokenizer] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tensors["vision_model.post_layernorm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    write_safetensors(path, tensors)
    return Path(path)


def _weights(seed: int, hidden: int, layers: int) -> dict[str, Tensor]:
    """Random bf16 text weights by their names in Gemma3TextModel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)

    def linear(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, std=columns**-0.5)

    weights = {
        "embed_tokens.weight": normal(_VOCABULARY, hidden, std=hidden**-0.5),
        "norm.weight": normal(hidden, std=0.1),
    }
    for index in range(layers):
        base = f"layers.{index}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            weights[f"{base}{name}_layernorm.weight"] = normal(hidden, std=0.1)
        for name, heads in (("q", _HEADS), ("k", _KV_HEADS), ("v", _KV_HEADS)):
            weights[f"{base}self_attn.{name}_proj.weight"] = linear(heads * _HEAD_DIM, hidden)
        weights[f"{base}self_attn.o_proj.weight"] = linear(hidden, _HEADS * _HEAD_DIM)
        for name in ("q", "k"):
            weights[f"{base}self_attn.{name}_norm.weight"] = normal(_HEAD_DIM, std=0.1)
        for name in ("gate", "up"):
            weights[f"{base}mlp.{name}_proj.weight"] = linear(_INNER, hidden)
        weights[f"{base}mlp.down_proj.weight"] = linear(hidden, _INNER)
    return weights


def _stored(name: str, value: Tensor, scale: str) -> dict[str, Tensor]:
    """The tensors that an fp8 export holds for one weight."""
    if scale == "none":
        return {name: value.to(torch.float8_e4m3fn)}
    if not name.endswith("_proj.weight"):
        return {name: value}
    wide = value.float()
    largest = wide.abs().amax(1, keepdim=True) if scale == "row" else wide.abs().amax()
    factor = largest / torch.finfo(torch.float8_e4m3fn).max
    layer = name.removesuffix(".weight")
    result = {name: (wide / factor).to(torch.float8_e4m3fn)}
    if scale == "legacy":
        return {**result, f"{layer}.scale_weight": factor.reshape(1), f"{layer}.scale_input": torch.ones(1)}
    note = torch.frombuffer(bytearray(b'{"format":"float8_e4m3fn"}'), dtype=torch.uint8)
    return {**result, f"{layer}.weight_scale": factor, f"{layer}.comfy_quant": note}


def _config(hidden: int, layers: int) -> dict[str, Any]:
    text = {
        "model_type": "gemma3_text",
        "vocab_size": _VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": _INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "query_pre_attn_scalar": _HEAD_DIM,
        "sliding_window": 1024,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_index": _VOCABULARY - 1,
        "eoi_token_index": _VOCABULARY - 2,
        "boi_token_index": _VOCABULARY - 3,
    }


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=list(_SPECIALS))
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", _SPECIALS.index("<bos>"))]
    )
    return tokenizer


def _sentencepiece() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()
