"""Sharded blocks: each process of a machine keeps a part of every frozen block on its device, and reads the others'.

What FSDP2 gives for frozen parameters, for weights of any precision: a block's bytes are split evenly, and the whole
block is put together in a ring slot ahead of compute. Nothing is reduced, because frozen weights have no gradient.

The parts never change. So a process gathers a block by reading its peers' memory (CUDA IPC; a mapped file on the CPU)
and needs nobody's help for it: there is no collective, the passes of the processes need not match in kind, number or
order, and none can wait for one that does something else (previews, a health check, more validation items, an extra
pass of a regularizer). Only two moments are common: everybody has loaded before anybody reads, and nobody leaves before
everybody is done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from ltx2_tuner.devices import exact
from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.streaming import ALIGNMENT, BlockStore, _Piece, _Slot, layout

_DEVICE = 6  # place of the device's number in what `reduce_tensor` gives to rebuild a CUDA tensor from


@dataclass(frozen=True)
class Peers:
    """The processes of one machine. rank: this one's place among them; their global ranks are consecutive."""

    rank: int = 0
    count: int = 1

    def bounds(self, total: int) -> list[tuple[int, int]]:
        """Which bytes (start, end) of `total` each peer keeps; the last parts may be shorter, or empty."""
        step = -(-total // (self.count * ALIGNMENT)) * ALIGNMENT
        return [(min(rank * step, total), min((rank + 1) * step, total)) for rank in range(self.count)]

    def exchange(self, value: object) -> list:
        """The values of all peers, by rank. Every process of the run has to call it."""
        everyone: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, value)
        first = distributed.get_rank() - self.rank
        return everyone[first : first + self.count]


class BlockShards:
    """This process's part of every block, taken from the blocks one by one as they are loaded.

    Attributes:
        own: the part's bytes by block index, on the device.
    """

    def __init__(self, peers: Peers, device: torch.device) -> None:
        self.peers, self.device = peers, device
        self.own: dict[int, Tensor] = {}

    def take(self, index: int, block: nn.Module) -> None:
        """Keep this process's part of a block's matrices, and let the block go without them (shapes stay)."""
        pieces, total = layout(block)
        start, end = self.peers.bounds(total)[self.peers.rank]
        own = torch.zeros(end - start, dtype=torch.uint8, device=self.device)
        hollow: dict[nn.Module, dict[str, Tensor]] = {}
        for piece in pieces:
            tensor = piece.layer.storage()[piece.name]
            first, last = max(piece.start, start), min(piece.start + piece.size, end)
            if first < last:
                values = tensor.contiguous().view(-1).view(torch.uint8)
                own[first - start : last - start].copy_(values[first - piece.start : last - piece.start])
            hollow.setdefault(piece.layer, {})[piece.name] = tensor.new_zeros(()).expand(tensor.shape)
        for layer, tensors in hollow.items():
            layer.rebind(tensors)
        self.own[index] = own


class ShardedStore(BlockStore):
    """Gathers each block of a model from the parts that the peers keep; install it as the model's `block_runner`.

    Making it is the moment when all processes have to meet.

    Args:
        blocks: all blocks of the model, adapters attached, matrices taken by `shards`.
        device: where blocks compute.
        ring: device buffers for whole blocks.

    Raises:
        UserError: a peer's memory cannot be read from here.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], shards: BlockShards, device: torch.device, *, ring: int = 2
    ) -> None:
        self._peers, self._own = shards.peers, shards.own
        self._parts = _gathered(shards)
        super().__init__(blocks, range(len(blocks)), device, ring=ring, pinned=False)

    def __str__(self) -> str:
        size = self.shard_bytes / 2**30
        return f"{len(self.streamed)} blocks sharded over {self._peers.count} processes ({size:.1f} GiB in each)"

    @property
    def shard_bytes(self) -> int:
        """Bytes of this process's parts of all blocks."""
        return sum(part.numel() for part in self._own.values())

    def _keep(self, index: int, pieces: list[_Piece], total: int) -> None:
        """The bytes were taken when the block was loaded."""

    def _copy_in(self, index: int, slot: _Slot) -> None:
        for start, part in self._parts[index]:
            slot.buffer[start : start + part.numel()].copy_(part, non_blocking=True)


def _gathered(shards: BlockShards) -> dict[int, list[tuple[int, Tensor]]]:
    """For each block where its parts start, and the parts, readable from here: the own one, then the next peer's."""
    peers, device = shards.peers, shards.device
    parts: dict[int, list[tuple[int, Tensor]]] = {index: [] for index in shards.own}
    with tempfile.TemporaryDirectory(prefix="ltx2_tuner_", ignore_cleanup_errors=True) as folder:
        offers = peers.exchange(
            {
                index: (part.numel(), _offer(part, Path(folder) / str(index)))
                for index, part in shards.own.items()
                if part.numel()
            }
        )
        for step in range(peers.count):
            rank = (peers.rank + step) % peers.count  # not all at the same peer's at once
            for index, (size, offer) in offers[rank].items():
                part = shards.own[index] if step == 0 else _opened(size, offer, device)
                parts[index].append((rank * offers[0][index][0], part))  # only the last parts are shorter
        peers.exchange(None)  # from here on everybody has opened everything
    return parts


def _offer(part: Tensor, path: Path) -> object:
    """What another process opens to read a part: the file it lies in, or the GPU's name and CUDA's handle."""
    if not part.is_cuda:
        torch.from_file(str(path), shared=True, size=part.numel(), dtype=torch.uint8).copy_(part)
        return str(path)
    return str(torch.cuda.get_device_properties(part.device).uuid), reduce_tensor(part)[1]


def _opened(size: int, offer: object, device: torch.device) -> Tensor:
    """The bytes of a peer's part, where they lie.

    Raises:
        UserError: the peer's GPU is hidden from this process, or the driver refuses.
    """
    if device.type != "cuda":
        return torch.from_file(offer, shared=True, size=size, dtype=torch.uint8)
    uuid, arguments = offer
    own = exact(device).index
    visible = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(torch.cuda.device_count())}
    if uuid not in visible:
        raise UserError(
            f"--shard_base: a process on {device} cannot see the GPU {uuid} of another one; start all of them with the "
            "same CUDA_VISIBLE_DEVICES, as accelerate launch does"
        )
    # Mapped into this device's own memory where the link allows it; else the driver copies through the other device.
    direct = torch.cuda.can_device_access_peer(own, visible[uuid])
    arguments = [*arguments[:_DEVICE], own if direct else visible[uuid], *arguments[_DEVICE + 1 :]]
    try:
        return rebuild_cuda_tensor(*arguments)
    except RuntimeError as error:
        raise UserError(
            f"--shard_base: {device} cannot read the memory of the GPU {uuid} ({str(error).splitlines()[0]}); use "
            "--blocks_to_swap in place of --shard_base"
        ) from error
