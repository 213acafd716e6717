"""What the command line says about memory and compilation. None: not typed, so the planner may choose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryOptions:
    """What trades memory for time.

    budget_gb: None is what is free. blocks_to_swap: blocks that live in host memory. ring_size: device buffers for
    them. shard_base: each process of the
    machine keeps its part of every block, none of which is streamed. recomputed_blocks: how many, from
    the first on, `checkpointing` recomputes; None is all. split_mode: `batch` or `query`.
    """

    budget_gb: float | None = None
    blocks_to_swap: int | None = None
    pinned: bool | None = None
    ring_size: int | None = None
    shard_base: bool = False
    checkpointing: bool | None = None
    recomputed_blocks: int | None = None
    checkpoint_offload: bool = False
    ffn_chunk_target: str = "none"
    ffn_chunk_size: int = 0
    split_attention: str = "none"
    split_mode: str | None = None
    split_chunk: int = 0
    attention: str = "sdpa"

    @property
    def ring(self) -> int:
        """Device buffers for blocks that come and go; two, so that copies overlap with arithmetic, unless typed."""
        return self.ring_size or 2


DYNAMIC = {"true": True, "false": False, "auto": None}  # what flags call the kinds of `CompileOptions.dynamic`


@dataclass(frozen=True)
class CompileOptions:
    """torch.compile per block.

    enabled None: on for CUDA where it works. dynamic: code for any number of tokens; None has torch make such code from
    the second shape on. dynamic_typed: whether the user has said it.
    """

    enabled: bool | None = None
    backend: str = "inductor"
    mode: str = "default"
    dynamic: bool | None = False
    dynamic_typed: bool = False
    fullgraph: bool = False
    cache_size_limit: int | None = None
