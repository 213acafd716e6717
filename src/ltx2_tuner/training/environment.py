"""What a run finds: the machine's software, whether torch has kernels for the GPU, and how much memory is needed."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ltx2_tuner.checkpoint.precision import effective_format
from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.options import MemoryOptions
from ltx2_tuner.memory.planner import SMALLER, Footprint, settle
from ltx2_tuner.training.footprint import estimate

if TYPE_CHECKING:
    from ltx2_tuner.training.sources import Sources, TrainingConfig

_GIB = 2**30
_CARDS = (8, 12, 16, 24, 32, 48, 80)  # GB, where no device says what there is


def environment_lines(device: torch.device) -> Iterator[str]:
    """Versions of Python, torch, CUDA and the driver, and the GPU with the architectures that torch is built for."""
    yield f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    if device.type != "cuda":
        yield f"device {device}, CUDA of this torch: {torch.version.cuda or 'none'}"
        return
    major, minor = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    driver = torch._C._cuda_getDriverVersion()
    yield (
        f"device {torch.cuda.get_device_name(device)}, sm_{major}{minor}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB "
        f"free, driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    )
    yield f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, built for {_listed()}"


def _listed() -> str:
    return ", ".join(torch.cuda.get_arch_list())


def check_architecture(device: torch.device) -> None:
    """Whether this torch can run on the GPU at all.

    Raises:
        UserError: it has no kernels for the GPU, and which build has.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        raise UserError(
            f"torch {torch.__version__} is built for {_listed()}, but {torch.cuda.get_device_name(device)} is "
            f"sm_{capability[0]}{capability[1]}; install a newer build: pip install --upgrade torch --index-url "
            "https://download.pytorch.org/whl/cu130"
        )


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a GPU runs what torch was built for.

    Machine code (`sm_86`) runs on the same major number and any minor one from its own on, the portable form
    (`compute_90`) on everything newer. The suffix `a` (`sm_90a`) binds code to one GPU, `f` to its family.
    """
    if not built_for:  # a build that does not say
        return True
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        found = (int(digits[:-1]), int(digits[-1]))
        newer = kind == "compute" or found[0] == capability[0]
        if found == capability or (newer and found < capability and not number.endswith("a")):
            return True
    return False


def memory_lines(config: TrainingConfig, sources: Sources, device: torch.device) -> Iterator[str]:
    """What the largest batch is estimated to need, and the smallest --blocks_to_swap with which it fits.

    Where neither a device nor --vram_budget says how much there is, common sizes of cards are gone through.
    """
    weights = effective_format(sources.checkpoint, config.precision.weights, device)
    config = replace(config, precision=replace(config.precision, weights=weights))
    footprint, options = estimate(config, sources), config.memory
    everything = settle(options, footprint, float("inf"))
    yield f"memory estimate of the largest batch: {everything.predicted / _GIB:.1f} GiB with all that fits resident"
    if options.budget_gb is not None:
        yield fitting(f"{options.budget_gb:g} GB", options, footprint, options.budget_gb * 1e9)
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        yield fitting(f"{free / _GIB:.1f} GiB free", options, footprint, free)
    else:
        for size in _CARDS:
            yield fitting(f"{size} GB", options, footprint, size * 1e9)


def fitting(label: str, options: MemoryOptions, footprint: Footprint, budget: float) -> str:
    """One line on how a run fits `budget` bytes with as few streamed blocks as it takes."""
    plan = settle(replace(options, ring_size=options.ring), footprint, budget)
    choice = plan.choice
    if not plan.fits:
        return (
            f"{label}: does not fit, {plan.predicted / _GIB:.1f} GiB even with --blocks_to_swap {choice.streamed}; "
            f"{SMALLER}"
        )
    how = "no recomputation"
    if choice.recomputed:
        how = f"--gradient_checkpointing ({choice.recomputed} of {footprint.blocks} blocks recomputed)"
    if choice.offload:
        how += " --gradient_checkpointing_cpu_offload"
    return f"{label}: fits from --blocks_to_swap {choice.streamed} on, {how}, {plan.predicted / _GIB:.1f} GiB"
