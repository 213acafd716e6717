"""What the user asks of the frozen weights' precision, checked against the checkpoint at hand."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch

from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.loftq_file import loftq_path, open_loftq
from ltx2_tuner.devices import exact
from ltx2_tuner.errors import UserError
from ltx2_tuner.quantization.formats import WeightFormat
from ltx2_tuner.quantization.fp8 import has_fp8_products

logger = logging.getLogger(__name__)

ROOMY_MEMORY = 48 << 30  # bytes: from here on an fp8 file may be expanded to bf16


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision of the frozen weights.

    Attributes:
        weights: how they are stored.
        quantize_device: "cpu", "cuda" or "gpu"; None is cuda where there is one.
        loftq_rank: rank of LoftQ start values, 0 for none.
        loftq_iterations: rounds of LoftQ when quantising at load.
        awq_alpha: strength of AWQ column scales, None for no AWQ.
        awq_batches: synthetic calibration batches.
    """

    weights: WeightFormat = field(default_factory=WeightFormat)
    quantize_device: str | None = None
    loftq_rank: int = 0
    loftq_iterations: int = 2
    awq_alpha: float | None = None
    awq_batches: int = 8

    @property
    def work_device(self) -> torch.device | None:
        """Where weights are quantised; None: where they will live."""
        if self.quantize_device == "cpu":
            return torch.device("cpu")
        return exact("cuda") if torch.cuda.is_available() else None


def check(checkpoint: Checkpoint, options: PrecisionOptions, *, device_memory: int | None = None) -> None:
    """Refuse precisions that the checkpoint does not go with; warn of wasteful ones.

    Args:
        device_memory: bytes of the device that the weights will live on, None when unknown.

    Raises:
        UserError: what was found and which flag to change.
    """
    kind, scales = options.weights.kind, options.weights.fp8_scales
    if checkpoint.is_nf4:
        if kind != "nf4":
            raise UserError(f"{checkpoint.path}: is an nf4 checkpoint; add --nf4_base (and drop --fp8_base)")
        if options.awq_alpha is not None:
            raise UserError(
                f"{checkpoint.path}: is nf4 already and --awq_calibration needs full weights; "
                "drop the flag or give the original checkpoint"
            )
        if options.loftq_rank:
            open_loftq(loftq_path(checkpoint.path, options.loftq_rank), options.loftq_rank).close()
    elif checkpoint.is_fp8:
        _check_fp8_file(checkpoint, options, device_memory)
    elif kind == "fp8" and scales == "none":
        logger.warning(
            "--fp8_base alone casts the weights without scales and loses small ones; --fp8_scaled is about 2 dB better"
        )


def _check_fp8_file(checkpoint: Checkpoint, options: PrecisionOptions, device_memory: int | None) -> None:
    kind = options.weights.kind
    if kind == "fp8" and options.weights.fp8_scales != "none":
        raise UserError(f"{checkpoint.path}: is fp8 already; drop --fp8_scaled and keep --fp8_base")
    if kind == "nf4":
        logger.warning("%s is fp8: nf4 weights made from it are rounded twice; prefer the bf16 file", checkpoint.path)
    if kind == "dense":
        text = f"{checkpoint.path}: is an fp8 checkpoint, which takes twice its size without --fp8_base; add --fp8_base"
        if device_memory is not None and device_memory < ROOMY_MEMORY:
            raise UserError(text)
        logger.warning(text)


def effective_format(checkpoint: Checkpoint, weights: WeightFormat, device: torch.device) -> WeightFormat:
    """The format that is used in the end: a file's own block size wins, fp8 products need a device that has them."""
    if checkpoint.is_nf4 and checkpoint.nf4_block_size != weights.nf4_block_size:
        logger.info("%s: nf4 blocks of %d, as in the file", checkpoint.path, checkpoint.nf4_block_size)
        weights = replace(weights, nf4_block_size=checkpoint.nf4_block_size)
    if weights.fp8_compute and not has_fp8_products(device):
        logger.info("--fp8_compute: %s has no row-scaled fp8 products; products are taken in the compute dtype", device)
        weights = replace(weights, fp8_compute=False, keep_transposed=False)
    return weights
