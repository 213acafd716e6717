"""Filling modules that were built without memory with the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.keys import COMPONENTS
from ltx2_tuner.errors import UserError

# What a config with impossible values makes a module's constructor raise.
CONFIG_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)

# What the user sets when a component is not in the file.
_FLAGS = {
    "transformer": "--ltx2_checkpoint",
    "video_encoder": "--vae or --ltx2_checkpoint",
    "video_decoder": "--vae or --ltx2_checkpoint",
    "audio_encoder": "--ltx2_checkpoint",
    "audio_decoder": "--ltx2_checkpoint",
    "vocoder": "--ltx2_checkpoint",
    "text": "--ltx2_text_encoder_checkpoint",
}


def on_meta() -> torch.device:
    """A context in which modules are built without memory."""
    return torch.device("meta")


def check_present(checkpoint: Checkpoint, component: str) -> None:
    """Raises UserError with the expected prefixes and the flag where the file holds nothing of a component."""
    if not checkpoint.component(component):
        prefixes = ", ".join(prefix for prefix, _ in COMPONENTS[component])
        raise UserError(
            f"{checkpoint.path}: has no tensors under {prefixes}; name a file that has them with {_FLAGS[component]}"
        )


def checked_shapes(
    checkpoint: Checkpoint,
    component: str,
    module: nn.Module,
    stored_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] | None = None,
) -> dict[str, str]:
    """Module key -> tensor name for everything the module holds.

    Args:
        stored_shape: `(name, shape in the module) -> shape in the file`, where the two differ.

    Raises:
        UserError: the file lacks the component or some of its tensors, or one has another shape.
    """
    check_present(checkpoint, component)
    found = checkpoint.component(component)
    flag = _FLAGS[component]
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in found]
    if missing:
        raise UserError(
            f"{checkpoint.path}: {len(missing)} of the {len(wanted)} tensors of the {component.replace('_', ' ')} are "
            f"missing, such as {missing[0]}; name a complete file with {flag}"
        )
    names = {key: found[key] for key in wanted}
    for key, name in names.items():
        shape = tuple(wanted[key].shape)
        expected = shape if stored_shape is None else stored_shape(name, shape)
        stored = checkpoint.entry(name).shape
        if stored != expected:
            raise UserError(
                f"{checkpoint.path}: {name} has the shape {list(stored)}, but the file's config asks for "
                f"{list(expected)}; name an unmodified file with {flag}"
            )
    return names


def fill(
    checkpoint: Checkpoint, component: str, module: nn.Module, device: str | torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Load a whole component (built on meta) and freeze it; floating tensors are cast to `dtype`."""
    for key, name in checked_shapes(checkpoint, component, module).items():
        assign(module, key, checkpoint.read(name, device, dtype))
    return module.requires_grad_(False).eval()


def assign(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer `key`."""
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
