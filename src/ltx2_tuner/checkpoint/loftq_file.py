"""The side file of LoftQ start values: `<model>.loftq_r<rank>.safetensors`, and finding them by layer again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors

Factors = Mapping[str, tuple[Tensor, Tensor]]
_PREFIXES = ("lora_unet_model_", "lora_unet_")  # the first is written, both are read


def loftq_path(model: str | os.PathLike, rank: int) -> Path:
    """Where the start values of a quantised model lie."""
    model = Path(model)
    return model.with_name(f"{model.stem}.loftq_r{rank}{model.suffix}")


def save_loftq(path: str | os.PathLike, factors: Factors, *, rank: int, iterations: int, block_size: int) -> None:
    """Write start values: layer path -> (down (rank, in), up (out, rank)), unscaled."""
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in factors.items():
        name = _PREFIXES[0] + layer.replace(".", "_")
        tensors |= {f"{name}.lora_A": down.contiguous(), f"{name}.lora_B": up.contiguous()}
    metadata = {
        "loftq_rank": str(rank),
        "loftq_iters": str(iterations),
        "nf4_block_size": str(block_size),
        "num_modules": str(len(factors)),
    }
    write_safetensors(path, tensors, metadata)


def load_loftq(path: str | os.PathLike, layers: Iterable[str], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Start values of the layers (paths such as `transformer_blocks.0.attn1.to_q`) that the file has.

    Raises:
        UserError: no such file, another rank, or no layer of it is among `layers`.
    """
    with open_loftq(path, rank) as file:
        factors = {}
        for layer in layers:
            flat = layer.replace(".", "_")
            name = next((prefix + flat for prefix in _PREFIXES if f"{prefix}{flat}.lora_A" in file.tensors), None)
            if name is not None and f"{name}.lora_B" in file.tensors:
                factors[layer] = (file.read(f"{name}.lora_A"), file.read(f"{name}.lora_B"))
    if not factors:
        raise UserError(f"{path}: none of its start values belongs to a layer of this network; {_remedy(rank)}")
    return factors


def open_loftq(path: str | os.PathLike, rank: int) -> SafetensorsFile:
    """The side file, once its header says that it is for this rank.

    Raises:
        UserError: no such file, or another rank.
    """
    path = Path(path)
    if not path.exists():
        others = sorted(path.parent.glob(f"{path.stem.rpartition('.loftq_r')[0]}.loftq_r*{path.suffix}"))
        found = f"found {', '.join(other.name for other in others)} instead" if others else "it does not exist"
        raise UserError(f"{path}: needed by --loftq_init, but {found}; {_remedy(rank)}")
    file = SafetensorsFile(path)
    stored = file.metadata.get("loftq_rank", str(rank))
    if stored != str(rank):
        file.close()
        raise UserError(f"{path}: found start values for rank {stored}, --network_dim is {rank}; {_remedy(rank)}")
    return file


def _remedy(rank: int) -> str:
    return f"re-run ltx2_quantize_model.py --loftq_init --network_dim {rank}"
