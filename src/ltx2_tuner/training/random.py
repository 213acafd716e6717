"""Where every random number of a training run comes from.

A draw is a pure function of (seed, stream, rank, micro-batch): generators are derived anew for every micro-batch, so a
resumed run draws what an uninterrupted one would have drawn, a stream that draws more cannot shift another, and ranks
differ by construction.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch

STREAMS = ("init", "sigma", "noise", "cond", "dropout")


def derive_seed(seed: int, stream: str, rank: int = 0, draw: int = 0, name: str = "") -> int:
    """A 63-bit seed from what the draw is for; equal on every machine and Python."""
    key = f"{seed}\0{stream}\0{rank}\0{draw}\0{name}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def derive_generator(
    seed: int, stream: str, rank: int = 0, draw: int = 0, *, name: str = "", device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator for one stream of one micro-batch."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, rank, draw, name))


@dataclass(frozen=True)
class DrawKey:
    """Names one micro-batch of one process: `index` counts the micro-batches drawn since the start of training."""

    seed: int
    rank: int
    index: int

    def generator(self, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
        return derive_generator(self.seed, stream, self.rank, self.index, device=device)

    def seed_default_generators(self) -> None:
        """Layers that draw from torch's default generator (network dropouts) get this micro-batch's own stream."""
        torch.manual_seed(derive_seed(self.seed, "dropout", self.rank, self.index))


def seed_default_generators(seed: int, rank: int) -> None:
    """Start torch's, numpy's and Python's default generators from the run's seed, for third-party layers."""
    torch.manual_seed(derive_seed(seed, "init", rank, name="torch"))
    np.random.seed(derive_seed(seed, "init", rank, name="numpy") % 2**32)
    random.seed(derive_seed(seed, "init", rank, name="python"))


def default_generator_states() -> dict[str, torch.Tensor]:
    """States of torch's, numpy's and Python's default generators as plain tensors, for the saved state."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states["numpy"] = torch.from_numpy(keys.astype(np.int64))
    states["numpy_position"] = torch.tensor([position, has_gauss], dtype=torch.int64)
    states["numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    version, internal, gauss = random.getstate()
    states["python"] = torch.tensor([version, *internal], dtype=torch.int64)
    states["python_gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    return states


def restore_default_generators(states: dict[str, torch.Tensor]) -> None:
    """Set the default generators to what `default_generator_states` returned."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    version, *internal = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
