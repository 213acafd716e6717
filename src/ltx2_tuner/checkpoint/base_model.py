"""The frozen transformer of a training run: checked, calibrated, quantised, with start values for its adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx2_tuner.checkpoint.awq_calibration import awq_scales
from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.loftq_file import load_loftq, loftq_path
from ltx2_tuner.checkpoint.precision import PrecisionOptions
from ltx2_tuner.checkpoint.transformer_loader import OnBlock, Transform, load_transformer
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.quantization import Nf4Linear
from ltx2_tuner.quantization.loftq import LoftQ

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """The transformer and, with LoftQ, start values by layer path: (down (rank, in), up (out, rank)), float32, CPU.

    up·down is what the base lacks of the weight; a network of scale alpha / rank divides `up` by it.
    """

    transformer: LTXTransformer
    start_values: Mapping[str, tuple[Tensor, Tensor]] | None = None


def load_base_model(
    checkpoint: Checkpoint,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    options: PrecisionOptions,
    *,
    transform: Transform | None = None,
    adapted: Callable[[str], bool] = lambda _layer: True,
    on_block: OnBlock | None = None,
    progress: bool = True,
) -> BaseModel:
    """Load what is trained on. Call `precision.check` first.

    Args:
        device: where the model computes and its tensors live.
        transform: merges LoRAs into the weights before they are quantised.
        adapted: whether a layer (by path) has an adapter: the others need no start values.
        on_block: as in `load_transformer`.

    Raises:
        UserError: the checkpoint, the start values or the calibration do not fit.
    """
    work = options.work_device
    scales = None
    if options.awq_alpha is not None:
        scales = awq_scales(
            checkpoint, variant, work or device, dtype, options.awq_alpha, options.awq_batches, transform=transform
        )
    loftq = None
    if options.loftq_rank and not checkpoint.is_nf4:
        loftq = LoftQ(
            options.loftq_rank,
            options.loftq_iterations,
            options.weights.nf4_block_size,
            lambda name: adapted(name.removesuffix(".weight")),
        )
    model = load_transformer(
        checkpoint,
        variant,
        device,
        dtype,
        weights=options.weights,
        quantize_device=work,
        transform=transform,
        column_scales=scales,
        quantise_nf4=loftq,
        on_block=on_block,
        progress=progress,
    )
    if not options.loftq_rank:
        return BaseModel(model)
    if loftq is not None:
        return BaseModel(model, loftq.factors)
    if options.loftq_iterations > 1:
        logger.info("%s is nf4 already: its base is fixed, --loftq_iters has no effect", checkpoint.path)
    layers = [path for path, module in model.named_modules() if isinstance(module, Nf4Linear) and adapted(path)]
    return BaseModel(model, load_loftq(loftq_path(checkpoint.path, options.loftq_rank), layers, options.loftq_rank))
