"""Prompts through tokenizer, Gemma, projection and connectors."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, write_tiny_checkpoint
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.text_encoding import GemmaOptions, load_text_encoder, write_tiny_gemma, write_tiny_gemma_file
from ltx2_tuner.text_encoding.tokenizer import MAX_TOKENS

CPU = torch.device("cpu")
PROMPTS = ["a cat walks through the snow", "", "two people talk in a café; a train passes"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {version: folder / f"{version}.safetensors" for version in ("2.0", "2.3")}
    for version, path in paths.items():
        write_tiny_checkpoint(path, version=version)
    return paths


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return GemmaOptions(root=write_tiny_gemma(tmp_path_factory.mktemp("gemma")))


def encoder(checkpoints, gemma, version="2.3", mode="av", dtype=torch.float32):
    return load_text_encoder(gemma, Checkpoint.open(checkpoints[version]), mode, CPU, dtype)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("mode", ["video", "av", "audio"])
def test_shapes(checkpoints, gemma, version, mode):
    text = encoder(checkpoints, gemma, version, mode, torch.bfloat16)
    config = text.connectors.config
    (found,) = text.encode(PROMPTS[:1])
    assert found.video.shape == (MAX_TOKENS, config.video.width) and found.video.dtype == torch.bfloat16
    assert (found.audio is None) == (mode == "video")
    if found.audio is not None:
        assert found.audio.shape == (MAX_TOKENS, config.audio.width)
    assert found.mask.tolist() == [1] * MAX_TOKENS


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_padding_and_company_change_nothing(checkpoints, gemma, version):
    """The reference pads every prompt to 1024 on the left; here shared padding is left out."""
    text = encoder(checkpoints, gemma, version)
    alone = text.encode(PROMPTS)
    for together, single in zip(text.encode(PROMPTS, batch_size=3), alone):
        torch.testing.assert_close(together.video, single.video, atol=2e-5, rtol=0)
        torch.testing.assert_close(together.audio, single.audio, atol=2e-5, rtol=0)
    ids, mask = text.tokenizer.encode_batch(PROMPTS)
    missing = MAX_TOKENS - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (missing, 0), value=text.tokenizer.pad_id)
    mask = torch.nn.functional.pad(mask, (missing, 0))
    with torch.no_grad():
        states = text.gemma(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        padded = text.connectors(states, mask)
    for row, single in enumerate(alone):
        torch.testing.assert_close(padded.video[row], single.video, atol=2e-5, rtol=0)


def test_different_prompts_differ(checkpoints, gemma):
    first, second = encoder(checkpoints, gemma).encode(["a cat", "a fox"])
    assert (first.video - second.video).abs().max() > 1e-3
    assert (first.audio - second.audio).abs().max() > 1e-3


def test_single_file_with_root_for_the_tokenizer(checkpoints, gemma, tmp_path):
    path = write_tiny_gemma_file(tmp_path / "g.safetensors", tokenizer=None)
    with pytest.raises(UserError, match=r"g.safetensors: holds no tokenizer .* use --gemma_root instead, or give it"):
        encoder(checkpoints, GemmaOptions(safetensors=path))
    both = encoder(checkpoints, GemmaOptions(safetensors=path, root=gemma.root))
    assert torch.equal(both.encode(PROMPTS)[0].video, encoder(checkpoints, gemma).encode(PROMPTS)[0].video)


def test_missing_connectors_are_found_before_gemma_is_opened(tmp_path, checkpoints):
    full = Checkpoint.open(checkpoints["2.3"])
    names = [name for name in full.names() if "connector" not in name and not name.startswith("text_embedding")]
    path = tmp_path / "dit only.safetensors"
    write_safetensors(path, {name: full.read(name) for name in names}, full.metadata)
    with pytest.raises(UserError, match=r"dit only.safetensors.*--ltx2_text_encoder_checkpoint") as caught:
        load_text_encoder(GemmaOptions(root=tmp_path / "nowhere"), Checkpoint.open(path), "av", CPU, torch.float32)
    assert "text_embedding_projection" in str(caught.value)


def test_gemma_of_another_size_is_refused(checkpoints, tmp_path):
    wrong = GemmaOptions(root=write_tiny_gemma(tmp_path, layers=2))
    with pytest.raises(
        UserError, match="hidden size 48 and 2 layers, the checkpoint was trained with hidden size 48 and 3"
    ):
        encoder(checkpoints, wrong)


def test_closed_encoder_holds_nothing(checkpoints, gemma):
    text = encoder(checkpoints, gemma)
    text.close()
    assert text.gemma is None and text.connectors is None
    with pytest.raises(RuntimeError, match="closed"):
        text.encode(["a"])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(checkpoints, gemma, bits):
    device = torch.device("cuda", 0)
    checkpoint = Checkpoint.open(checkpoints["2.3"])
    options = GemmaOptions(root=gemma.root, load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    exact = load_text_encoder(gemma, checkpoint, "av", device, torch.bfloat16)
    text = load_text_encoder(options, checkpoint, "av", device, torch.bfloat16)
    linears = {type(module).__name__ for module in text.gemma.modules() if "Linear" in type(module).__name__}
    assert linears == {f"Linear{'8bitLt' if bits == 8 else '4bit'}"}
    assert {b.dtype for n, b in text.gemma.named_buffers() if "inv_freq" in n} == {torch.float32}
    for quantised, reference in zip(text.encode(PROMPTS), exact.encode(PROMPTS)):
        similarity = torch.nn.functional.cosine_similarity(quantised.video.float(), reference.video.float(), dim=-1)
        assert similarity.mean() > 0.9
    text.close()


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [True, False])
def test_fp8_on_a_device(checkpoints, tmp_path, offload):
    path = write_tiny_gemma_file(tmp_path / "g.safetensors", fp8=True)
    checkpoint = Checkpoint.open(checkpoints["2.3"])
    options = GemmaOptions(safetensors=path, fp8_weight_offload=offload)
    device = torch.device("cuda", 0)
    found = load_text_encoder(options, checkpoint, "av", device, torch.float32).encode(PROMPTS)
    expected = load_text_encoder(options, checkpoint, "av", CPU, torch.float32).encode(PROMPTS)
    for ours, reference in zip(found, expected):
        torch.testing.assert_close(ours.video, reference.video, atol=2e-3, rtol=0)
