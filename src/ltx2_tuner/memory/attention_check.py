"""Trying an attention kernel before a run relies on it: builds that do not suit the GPU give wrong numbers silently."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer.attention_backends import AttentionFunction, attention_function, sdpa

logger = logging.getLogger(__name__)

_TOLERANCE = 2e-2
_SHAPE = (2, 96, 4, 64)  # B, T, H, D
_MASKED = 7  # keys at the end that are hidden in the masked call


def usable_backend(name: str, device: torch.device) -> str:
    """`name`, or `sdpa` with a warning where its results or gradients are not those of torch's attention.

    Raises:
        UserError: the package is missing, or the kernel does not run here.
    """
    if name == "sdpa":
        return name
    attend = attention_function(name)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            worst = max(_difference(attend, device, mask) for mask in (False, True))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--{name}: its kernel does not run on {device} ({reason}); use --sdpa") from error
    if worst <= _TOLERANCE:
        return name
    logger.warning(
        "--%s: its results differ from torch's attention by %.2g here; --sdpa is used instead (install a build of the "
        "package for this GPU and torch)",
        name,
        worst,
    )
    return "sdpa"


def _difference(attend: AttentionFunction, device: torch.device, masked: bool) -> float:
    """The largest difference of the output or a gradient, relative to the largest value; infinite for NaN."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(_SHAPE, generator=generator).to(device, dtype) for _ in range(4)]
    mask = None
    if masked:
        mask = torch.zeros(_SHAPE[0], 1, 1, _SHAPE[1], dtype=dtype, device=device)
        mask[..., -_MASKED:] = -1e4
    pairs = zip(_results(attend, inputs, mask), _results(sdpa, inputs, mask))
    differences = [float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs]
    return max(difference if difference == difference else float("inf") for difference in differences)


def _results(attend: AttentionFunction, inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Output and gradients of query, key and value, in float32."""
    *leaves, gradient = inputs
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = attend(*leaves, mask)
    return [tensor.float() for tensor in (output.detach(), *torch.autograd.grad(output, leaves, gradient))]
