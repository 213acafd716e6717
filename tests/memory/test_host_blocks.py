"""Streamed blocks go to the host while a checkpoint is loaded, and stay there."""

from __future__ import annotations

import threading

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer
from ltx2_tuner.memory.host_blocks import HostBlocks
from ltx2_tuner.memory.streaming import BlockStore
from ltx2_tuner.quantization import FrozenLinear
from ltx2_tuner.quantization.formats import WeightFormat
from tests.training.tiny import write_checkpoint

BLOCKS, STREAMED = 4, (0, 2, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("host_blocks") / "tiny.safetensors"
    return Checkpoint.open(write_checkpoint(path, layers=BLOCKS))


def homes(block: torch.nn.Module) -> set[int]:
    """Where the memory begins that the block's frozen matrices lie in."""
    layers = (layer for layer in block.modules() if isinstance(layer, FrozenLinear))
    return {tensor.untyped_storage().data_ptr() for layer in layers for tensor in layer.storage().values()}


def load_and_stream(checkpoint: Checkpoint, weights: str, device: str) -> tuple[torch.nn.Module, BlockStore]:
    form, device = WeightFormat(weights, nf4_block_size=16), torch.device(device)
    hosts = HostBlocks(STREAMED, device)
    model = load_transformer(checkpoint, device=device, weights=form, on_block=hosts.take, progress=False)
    return model, BlockStore(model.transformer_blocks, STREAMED, device, hosts=hosts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("weights", ["dense", "fp8", "nf4"])
def test_what_is_streamed_is_what_the_file_gives(checkpoint, weights, device):
    plain = load_transformer(
        checkpoint, device=device, weights=WeightFormat(weights, nf4_block_size=16), progress=False
    )
    model, store = load_and_stream(checkpoint, weights, device)
    for index, block in enumerate(model.transformer_blocks):
        store.acquire(index, 1)
        expected = plain.transformer_blocks[index].state_dict()
        for name, tensor in block.state_dict().items():
            assert tensor.device.type == device
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), (index, name)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("host blocks")]
    if device == "cuda":
        assert store.recordable
        store.close()


def test_the_store_streams_out_of_the_memory_that_was_filled(checkpoint):
    """No second copy, and blocks that are not streamed stay where they are."""
    hosts = HostBlocks(STREAMED, torch.device("cpu"))
    model = load_transformer(checkpoint, weights=WeightFormat("fp8"), progress=False)
    resident = homes(model.transformer_blocks[1])
    for index, block in enumerate(model.transformer_blocks):
        hosts.take(index, block)
        if index in STREAMED:  # those before have arrived
            assert all(len(homes(model.transformer_blocks[before])) == 1 for before in STREAMED if before < index)
    filled = {index: homes(model.transformer_blocks[index]) for index in (0, 2)}
    store = BlockStore(model.transformer_blocks, STREAMED, torch.device("cpu"), hosts=hosts)
    assert homes(model.transformer_blocks[1]) == resident
    assert {index: {store._host[index].bytes.untyped_storage().data_ptr()} for index in filled} == filled


def test_what_goes_wrong_in_the_background_is_raised(checkpoint):
    hosts = HostBlocks(STREAMED, torch.device("cpu"))
    model = load_transformer(checkpoint, weights=WeightFormat("fp8"), progress=False)
    layer = next(layer for layer in model.transformer_blocks[0].modules() if isinstance(layer, FrozenLinear))
    layer.to("meta")  # has no bytes to copy
    hosts.take(0, model.transformer_blocks[0])
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        hosts.hand_over()
