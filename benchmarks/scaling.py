"""Seconds of a training step on several GPUs, one sample on each, gradients averaged as the trainer does it.

Starts one process a GPU and prints one JSON line for each number of GPUs; `efficiency` is samples/s a GPU against the
first line. With --shard each process keeps its part of every block (on one GPU there is nothing to share). Everything
else is an option of benchmarks/train_step.py.

python benchmarks/scaling.py --gpus 1 2 --recompute full
python benchmarks/scaling.py --gpus 1 2 --shard --recompute full --precision fp8
python benchmarks/scaling.py --gpus 1 2 --layers 2 --width_divisor 32 --size 64 64 --frames 9 --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import distributed, multiprocessing

from benchmarks import train_step
from benchmarks.train_step import Step, host_peak_gib, measure
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.memory.sharding import BlockShards, Peers
from ltx2_tuner.training.window import Gradients


class ParallelStep(Step):
    """A step whose gradients are the mean over all processes, gathered by the trainer's own code."""

    def __init__(self, args: argparse.Namespace, device: torch.device, shard: bool) -> None:
        rank, count = distributed.get_rank(), distributed.get_world_size()
        self.shards = BlockShards(Peers(rank, count), device) if shard else None
        super().__init__(args, device)
        names = [name for name, _ in self.network.named_parameters()]
        self.gradients = Gradients(self.parameters, names, max_norm=1.0)
        self.flags = torch.zeros(1, device=device), torch.zeros(1, device=device)

    def average(self) -> None:
        self.gradients.gather(*self.flags)


def work(rank: int, count: int, port: int, args: argparse.Namespace, shard: bool, lines: multiprocessing.Queue) -> None:
    """One process of `count`: train, and let the first one put what all of them measured into `lines`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    on_cuda = args.device.startswith("cuda")
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_cuda else "gloo", rank=rank, world_size=count, device_id=device if on_cuda else None
    )
    torch.set_num_threads(1)  # as torchrun does: processes that all want every core wait for each other
    torch.manual_seed(0)  # all processes start from the same adapter
    step = ParallelStep(args, device, shard)
    seconds = measure(step, device)
    peak = train_step.peak_gib(device)
    measured: list = [None] * count
    distributed.all_gather_object(measured, (seconds, peak, host_peak_gib()))
    if rank == 0:
        slowest = max(seconds for seconds, *_ in measured)
        lines.put(
            {
                "gpus": count,
                "sharded": shard,
                "precision": args.precision,
                "recompute": args.recompute,
                "mode": args.mode,
                "frames": args.frames,
                "size": list(args.size),
                "rank": args.rank,
                "layers": args.layers,
                "compiled": step.plan.compiled,
                "graphs": bool(step.graphs and step.graphs.recordings),
                "sec": round(slowest, 4),
                "samples_per_sec": round(count / slowest, 4),
                "peak_gib": [peak for _, peak, _ in measured],
                "host_peak_gib": [host for *_, host in measured],
                "gpu": train_step.gpu_name(device),
                "torch": torch.__version__,
            }
        )
    distributed.barrier()  # until here another process may read this one's part of the blocks
    distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure")
    parser.add_argument("--shard", action="store_true", help="spread the frozen blocks over the processes")
    own, rest = parser.parse_known_args(argv)
    args = train_step.parse_arguments(rest)
    keep_memory_in_one_piece()  # as the trainer does; all processes inherit it
    if own.shard and args.blocks_to_swap:
        parser.error("--shard and --blocks_to_swap exclude each other")
    start = multiprocessing.get_context("spawn")
    found: list[dict[str, object]] = []
    for count in own.gpus:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        lines = start.SimpleQueue()
        multiprocessing.spawn(work, (count, port, args, own.shard and count > 1, lines), nprocs=count)
        line = lines.get()
        first = found[0] if found else line
        share = line["samples_per_sec"] / count / (first["samples_per_sec"] / first["gpus"])
        found.append({**line, "efficiency": round(share, 3)})
        print(json.dumps(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    main()
