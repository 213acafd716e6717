"""AWQ column scales of a checkpoint: the full-precision model on synthetic inputs, one block in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx2_tuner.checkpoint.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.fingerprint import component_id
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.checkpoint.transformer_loader import Transform, TransformerReader
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.models.transformer import LTXTransformer, Modality
from ltx2_tuner.models.transformer.tokens import audio_positions, video_positions
from ltx2_tuner.quantization.awq import column_scale, observed_inputs
from ltx2_tuner.quantization.formats import WeightFormat

logger = logging.getLogger(__name__)

VIDEO_GRID = (4, 8, 8)  # latent frames, height, width
FRAME_RATE = 25.0
AUDIO_TOKENS = 32
TEXT_TOKENS = 128
LEAST_COVERAGE = 0.9


def awq_scales(
    checkpoint: Checkpoint,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    alpha: float,
    batches: int,
    *,
    transform: Transform | None = None,
) -> dict[str, Tensor]:
    """Column scales (in,) by weight name, from the file beside the checkpoint or calibrated and written there.

    Merged LoRAs (`transform`) make other weights, so their scales are neither read nor written.

    Raises:
        UserError: fewer than 90 % of the layers were reached.
    """
    path = checkpoint.path.with_name(f"{checkpoint.path.stem}.awq_scales.safetensors")
    wanted = {
        "alpha": str(alpha),
        "batches": str(batches),
        "variant": variant,
        "checkpoint": component_id(checkpoint, "transformer"),
    }
    if transform is None:
        found = _read(path, wanted)
        if found is not None:
            return found
    scales = calibrate(checkpoint, variant, device, dtype, alpha, batches, transform)
    if transform is None:
        try:
            write_safetensors(path, scales, wanted)
        except (OSError, UserError) as error:
            logger.warning("the AWQ scales could not be kept for the next run (%s)", error)
    return scales


def calibrate(
    checkpoint: Checkpoint,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    alpha: float,
    batches: int,
    transform: Transform | None = None,
) -> dict[str, Tensor]:
    """Run the model once on `batches` samples of rising noise level and make a column scale for each block matrix."""
    reader = TransformerReader(checkpoint, variant, device, dtype, WeightFormat(), transform=transform)
    model = reader.model.requires_grad_(False)
    scales: dict[str, Tensor] = {}

    def run_block(block: nn.Module, index: int, *arguments: object) -> object:
        prefix = f"transformer_blocks.{index}."
        for key in reader.keys:
            if key.startswith(prefix):
                reader.load(key)
        layers = {path: model.get_submodule(path) for path in reader.targets if path.startswith(prefix)}
        with observed_inputs(layers) as means:
            result = block(*arguments)
        for path, mean in means.items():
            scales[f"{path}.weight"] = column_scale(mean, layers[path].weight, alpha).cpu()
        block.to("meta")
        return result

    for key in reader.keys:
        if not key.startswith("transformer_blocks."):
            reader.load(key)
    model.block_runner = run_block
    with torch.no_grad():
        model(**_inputs(model, batches, device))
    if len(scales) < LEAST_COVERAGE * len(reader.targets):
        raise UserError(
            f"{checkpoint.path}: the AWQ calibration reached {len(scales)} of {len(reader.targets)} layers; "
            "train without --awq_calibration"
        )
    return scales


def _inputs(model: LTXTransformer, batches: int, device: torch.device) -> Mapping[str, Modality | None]:
    """One batch that holds all calibration samples; sample k has noise level (k + 1/2) / batches."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    sigma = (torch.arange(batches) + 0.5) / batches
    frames, height, width = VIDEO_GRID

    def modality(stream: str, tokens: int, channels: int, positions: Tensor) -> Modality:
        return Modality(
            latent=torch.randn(batches, tokens, channels, generator=generator).to(device),
            sigma=sigma.to(device),
            timesteps=sigma[:, None].to(device),
            positions=positions.to(device),
            context=torch.randn(batches, TEXT_TOKENS, config.context_width(stream), generator=generator).to(device),
        )

    inputs: dict[str, Modality | None] = {"video": None, "audio": None}
    if "video" in model.streams:
        positions = video_positions(frames, height, width, FRAME_RATE, batch=batches)
        inputs["video"] = modality("video", frames * height * width, config.in_channels, positions)
    if "audio" in model.streams:
        positions = audio_positions(AUDIO_TOKENS, batch=batches)
        inputs["audio"] = modality("audio", AUDIO_TOKENS, config.audio_in_channels, positions)
    return inputs


def _read(path: Path, wanted: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The kept scales when they were made for the same weights with the same settings."""
    if not path.exists():
        return None
    with SafetensorsFile(path) as file:
        if any(file.metadata.get(key) != value for key, value in wanted.items()):
            return None
        logger.info("AWQ scales from %s", path)
        return {name: file.read(name) for name in file.tensors}
