"""What of the device's memory is free, and what torch holds of it for nobody."""

from __future__ import annotations

import torch


def room() -> int:
    """Bytes that can still be reserved: what the device has free, or what is left of the process's limit."""
    free, total = torch.cuda.mem_get_info()
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()  # torch 2.9 and later
    return min(free, int(fraction * total) - torch.cuda.memory_reserved())


def give_back() -> None:
    """Free what nobody holds, and what cuBLAS works in: torch keeps 32 MiB of that for each thread and stream.

    Workspaces of a recording would keep all of its memory from being given back.
    """
    torch.cuda.synchronize()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    torch.cuda.empty_cache()


def ran_out(error: BaseException | None) -> bool:
    """Whether memory did, or had before this error: a recording that is cut short may not end properly."""
    return any(isinstance(one, torch.OutOfMemoryError) for one in chain_of(error))


def chain_of(error: BaseException | None) -> list[BaseException]:
    """An error and all that it came after, the first one last."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__context__
    return chain
