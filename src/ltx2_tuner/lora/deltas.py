"""Adding LoRAs to full weights: before quantisation while a checkpoint streams in, or into a new checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.formats import LoRAFile

logger = logging.getLogger(__name__)


class WeightDeltas:
    """W + Σ multiplier · alpha/r · up·down, in float32, in the order of the files.

    Args:
        loras: each file with its multiplier.
        device: where the products are formed; None for the weight's own device.
    """

    def __init__(self, loras: Sequence[tuple[LoRAFile, float]], device: torch.device | None = None) -> None:
        self.loras = tuple(loras)
        self.device = device
        self.used: set[str] = set()

    @property
    def paths(self) -> set[str]:
        """Paths of all layers that some file adapts."""
        return {path for lora, _ in self.loras for path in lora.modules}

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """The weight `<path>.weight` (out, in) with its adapters added, in its own dtype; itself when it has none.

        Raises:
            UserError: an adapter is for a layer of another size.
        """
        path = name.removesuffix(".weight")
        if not any(path in lora.modules for lora, _ in self.loras):
            return weight
        self.used.add(path)
        total = weight.to(self.device or weight.device, torch.float32)
        for lora, multiplier in self.loras:
            module = lora.modules.get(path)
            if module is None:
                continue
            found = (module.up.shape[0], module.down.shape[1])
            if found != tuple(weight.shape):
                raise UserError(
                    f"{lora.source}: {path} is for a layer of size {found[0]}x{found[1]}, the model's is "
                    f"{weight.shape[0]}x{weight.shape[1]}; the file was made for another model"
                )
            down = module.down.to(total.device, torch.float32)
            up = module.up.to(total.device, torch.float32)
            total = torch.addmm(total, up, down, alpha=multiplier * module.scale)
        return total.to(weight.device, weight.dtype)

    def check_used(self) -> None:
        """Call after the last weight.

        Raises:
            UserError: a file changed nothing.
        """
        for lora, _ in self.loras:
            hit = lora.modules.keys() & self.used
            if not hit:
                raise UserError(f"{lora.source}: none of its modules is a layer of this model; give a matching LoRA")
            missed = len(lora.modules) + len(lora.unknown) - len(hit)
            if missed:
                logger.warning("%s: %d modules have no layer in this model and are left out", lora.source, missed)
