"""Compiling the transformer block by block.

All blocks share their code, so one compilation of a part serves all of them; a new bucket shape costs one more. Parts
are compiled with static shapes, as the kernels are faster, unless there are many buckets. torch keeps compilations in
its cache directory for later runs, as long as each graph is of a kind that it keeps: no `torch.autograd.Function` in it
(see `quantization.operators`), no switch of autocast.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ltx2_tuner.memory.options import CompileOptions
from ltx2_tuner.models.transformer.block import StreamInputs
from ltx2_tuner.quantization.operators import open_to_inductor

logger = logging.getLogger(__name__)

# One entry a bucket shape, times grad and no-grad, times train and eval.
CACHE_ENTRIES = 64
PARTS = ("open_video", "open_audio", "close_video", "close_audio")


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile has a backend for this device that runs here (it needs Triton on CUDA)."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def compiled(options: CompileOptions, device: torch.device) -> bool:
    """Whether blocks are compiled: as typed, else where it works."""
    return compiler_works(device) if options.enabled is None else options.enabled


@contextlib.contextmanager
def compiler_made_ready(wanted: bool) -> Iterator[None]:
    """Within the block, which reads files, a thread imports what compiles, and has its processes start.

    That takes seconds of the first step. Left to torch, it begins when the first graph has been traced, and until the
    processes are there kernels are compiled one by one.
    """
    if not wanted:
        yield
        return
    thread = threading.Thread(target=_make_compiler_ready, name="compiler", daemon=True)
    thread.start()
    yield
    thread.join()  # an error within the block is told without waiting


def _make_compiler_ready() -> None:
    with contextlib.suppress(Exception):  # whoever compiles is told, if that fails too
        getattr(importlib.import_module("torch._inductor.async_compile"), "maybe_warm_pool", lambda: None)()
    with contextlib.suppress(Exception):
        importlib.import_module("torch._inductor.compile_fx")


def compile_blocks(
    blocks: nn.ModuleList,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = False,
    fullgraph: bool = False,
    cache_entries: int = CACHE_ENTRIES,
) -> None:
    """Compile the parts of each block in place, after adapters are attached; `TwoStreams` calls them one by one.

    Args:
        mode: torch.compile's mode; None is its default.
        dynamic: False compiles each shape anew. True makes code for any number of tokens; torch would have sizes of
            the adapters symbolic, too, which takes several times as long. None does from the second shape on.
        cache_entries: compilations kept before torch falls back to eager; too few of them turn a run with many
            buckets into one that compiles for ever.
    """
    open_to_inductor()
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_matters)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, cache_entries)
    torch._dynamo.config.accumulated_cache_size_limit = max(
        torch._dynamo.config.accumulated_cache_size_limit, len(blocks) * cache_entries
    )
    keywords = {"backend": backend, "mode": mode, "dynamic": None if dynamic else dynamic, "fullgraph": fullgraph}
    for block in blocks:
        for name in PARTS:
            part = torch.compile(getattr(block, name), **keywords)
            setattr(block, name, _of_any_length(part) if dynamic else part)


def _of_any_length(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled part of a block, told that it will be given more tokens, or fewer, another time."""

    def run(*arguments: object, **keywords: object) -> Tensor:
        for tensor in _with_tokens(arguments):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return part(*arguments, **keywords)

    return run


def _with_tokens(arguments: Iterable[object]) -> Iterator[Tensor]:
    """The tensors (B, T, ...) among what a part is given; masks are left to torch, few passes have one."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, StreamInputs):
            yield from (tensor for tensor in (value.index, *value.rope) if tensor is not None)
            yield from () if value.cross is None else value.cross.rope


def _matters(record: logging.LogRecord) -> bool:
    """False for torch's reminder to look whether recomputed parts change tensors in place: they do not."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()
