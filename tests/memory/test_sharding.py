"""Blocks spread over two processes compute what whole ones do, whatever the other process does meanwhile."""

from __future__ import annotations

import gc
import itertools
import os
import sys

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.transformer_loader import load_transformer
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model
from ltx2_tuner.memory.sharding import BlockShards, Peers
from ltx2_tuner.memory.streaming import layout
from ltx2_tuner.quantization import FrozenLinear
from ltx2_tuner.quantization.formats import WeightFormat
from tests.memory.blocks import BLOCKS, adapted, gradients
from tests.models.transformer import tiny
from tests.training.ranks import run_ranks
from tests.training.tiny import write_checkpoint

CPU = torch.device("cpu")
WEIGHTS = ("dense", "fp8", "nf4")


def sharded(weights: str, device: torch.device, ring: int, recompute: bool):
    """The model of `adapted`, its blocks spread over the processes of the default group."""
    model, network = adapted(weights, device.type, torch.float32 if device.type == "cpu" else torch.bfloat16)
    shards = BlockShards(Peers(torch.distributed.get_rank(), torch.distributed.get_world_size()), device)
    for index, block in enumerate(model.transformer_blocks):
        shards.take(index, block)
    options = MemoryOptions(shard_base=True, ring_size=ring, checkpointing=recompute)
    plan = prepare_model(model, options, CompileOptions(enabled=False), device, shards)
    return model, network, plan.store


@torch.no_grad()
def outputs(model, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Velocities of a pass without gradients, which may use other kernels."""
    return model(**{name: tiny.to(value, device.type) for name, value in tiny.inputs(model.config).items()})


def compare(weights: str, device: torch.device) -> None:
    """Passes of a sharded model against those of a whole one; rank 1 runs more of them, and others."""
    rank = torch.distributed.get_rank()
    for recompute, ring in ((False, 2), (True, 2), (False, 1), (True, 3)):
        model, network = adapted(weights, device.type, torch.float32 if device.type == "cpu" else torch.bfloat16)
        total = sum(layout(block)[1] for block in model.transformer_blocks)
        model.enable_gradient_checkpointing(recompute)
        expected, without = gradients(model, network, device.type), outputs(model, device)
        model, network, store = sharded(weights, device, ring, recompute)
        for _ in range(1 + 3 * rank):
            found = gradients(model, network, device.type)
            assert all(torch.equal(*pair) for pair in zip(found, expected)), (weights, recompute, ring)
            assert all(torch.equal(*pair) for pair in zip(outputs(model, device), without))
        assert abs(store.shard_bytes - total / 2) <= 256 * BLOCKS and store.host_bytes == 0
        assert store.device_bytes == ring * total // BLOCKS
        torch.distributed.barrier()


@pytest.mark.parametrize("weights", ["dense", pytest.param("fp8", marks=pytest.mark.slow), "nf4"])
def test_gradients_are_those_of_whole_blocks(weights):
    for done in run_ranks(["-m", "tests.memory.test_sharding", weights, "cpu"]):
        assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gpus_read_each_other(weights):
    """Two processes, on two GPUs where there are two, else on one."""
    for done in run_ranks(["-m", "tests.memory.test_sharding", weights, "cuda"]):
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [0, 1, 256, 300, 4096, 100_000])
def test_parts_are_even_aligned_and_whole(count, total):
    bounds = Peers(0, count).bounds(total)
    assert len(bounds) == count and bounds[0][0] == 0 and bounds[-1][1] == total
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert all(start % 256 == 0 or start == total for start, _ in bounds)
    assert max(end - start for start, end in bounds) < total / count + 256


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_more_than_one_block_is_whole_while_loading(tmp_path, weights):
    path = write_checkpoint(tmp_path / "tiny.safetensors", layers=3)
    shards = BlockShards(Peers(1, 2), CPU)
    others = list(frozen_layers())  # held, or new layers could get the ids of those that other tests left
    before, taken = set(map(id, others)), []

    def take(index, block):
        mine = {id(layer) for layer in block.modules() if isinstance(layer, FrozenLinear)}
        assert {id(layer) for layer in frozen_layers() if id(layer) not in before and bytes_of(layer) > 8} == mine
        shards.take(index, block)
        taken.append(index)

    checkpoint, form = Checkpoint.open(path), WeightFormat(weights, nf4_block_size=16)
    model = load_transformer(checkpoint, weights=form, on_block=take, progress=False)
    assert taken == [0, 1, 2] and all(bytes_of(layer) <= 8 for layer in model.modules() if hasattr(layer, "rebind"))
    full = load_transformer(checkpoint, weights=form, progress=False)
    for index, block in enumerate(full.transformer_blocks):
        pieces, total = layout(block)
        buffer = torch.zeros(total, dtype=torch.uint8)
        for piece in pieces:
            piece.view(buffer).copy_(piece.layer.storage()[piece.name])
        start, end = shards.peers.bounds(total)[1]
        assert torch.equal(shards.own[index], buffer[start:end])


def frozen_layers() -> list[FrozenLinear]:
    return [found for found in gc.get_objects() if type(found).__mro__.count(FrozenLinear)]


def bytes_of(layer: FrozenLinear) -> int:
    """Of the largest of its tensors."""
    return max(tensor.untyped_storage().nbytes() for tensor in layer.storage().values())


if __name__ == "__main__":
    if sys.argv[2] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo")
    compare(sys.argv[1], torch.device(sys.argv[2]))
    torch.distributed.destroy_process_group()
