"""LoftQ: start values of a LoRA that make up for what NF4 loses of a weight.

W is split into Q + up·down. One iteration is the best low-rank fit of W - Q(W). More iterations move the base too:
Q becomes Q(W - up·down), and the fit is made anew; then the base that is stored must be that last Q.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ltx2_tuner.quantization import nf4

logger = logging.getLogger(__name__)

OVERSAMPLING = 32
POWER_ITERATIONS = 4  # the spectrum of a rounding error is flat: with 2 the fit loses a tenth of its gain


class LoftQ:
    """Quantises weights one by one and keeps their start values; takes the place of `nf4.quantise` while loading.

    Args:
        rank: of the adapters.
        iterations: rounds of quantising and fitting; 1 leaves the base at Q(W).
        block_size: of NF4.
        wanted: whether the layer of a weight name has an adapter; others are quantised as usual.

    Attributes:
        factors: layer name -> (down (rank, in), up (out, rank)) in float32 on the CPU, with up·down ≈ W - base.
    """

    def __init__(
        self, rank: int, iterations: int, block_size: int, wanted: Callable[[str], bool] = lambda _name: True
    ) -> None:
        self.rank = rank
        self.iterations = iterations
        self.block_size = block_size
        self.wanted = wanted
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, weight: Tensor, column_scale: Tensor | None = None) -> nf4.Nf4Tensor:
        """The nf4 base of the weight (out, in) called `name` (ending in `.weight`), times column_scale (in,)."""
        target = weight.float() if column_scale is None else weight.float() * column_scale
        plain = base = nf4.quantise(target, self.block_size, weight.dtype)
        if not self.wanted(name):
            return base
        layer = name.removesuffix(".weight")
        try:
            down, up = low_rank(target - base.dense(), self.rank, layer)
            for _ in range(self.iterations - 1):
                base = nf4.quantise(target - up @ down, self.block_size, weight.dtype)
                down, up = low_rank(target - base.dense(), self.rank, layer)
        except torch.linalg.LinAlgError as error:
            logger.warning("%s starts from usual values: no LoftQ start values could be fitted (%s)", layer, error)
            return plain
        down = down if column_scale is None else down / column_scale  # the product divides by it again
        self.factors[layer] = (down.cpu(), up.cpu())
        return base


def low_rank(matrix: Tensor, rank: int, seed: str) -> tuple[Tensor, Tensor]:
    """The best (down (rank, in), up (out, rank)) with up·down ≈ matrix (out, in), singular values split evenly.

    Randomised, with oversampling and power iterations, from a generator that depends on the text `seed`; exact for
    small matrices and where that fails.

    Raises:
        torch.linalg.LinAlgError: the matrix has values that are not finite, or no decomposition converges.
    """
    if not torch.isfinite(matrix).all():
        raise torch.linalg.LinAlgError("the weight is not finite")
    rank = min(rank, *matrix.shape)
    try:
        left, values, right = _randomised(matrix, rank, seed)
    except torch.linalg.LinAlgError:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _randomised(matrix: Tensor, rank: int, seed: str) -> tuple[Tensor, Tensor, Tensor]:
    columns = rank + OVERSAMPLING
    if columns >= min(matrix.shape):
        return torch.linalg.svd(matrix, full_matrices=False)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    probe = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe)[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left, values, right
