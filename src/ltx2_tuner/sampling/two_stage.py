"""Two-stage sampling: the whole schedule at half size, then upsampled latents refined at full size.

Legend: C channels, F/H/W latent frames, height, width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import torch

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.upsampler_file import load_latent_statistics, load_spatial_upsampler
from ltx2_tuner.lora import LoRANetwork, load_lora, table_of
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.upsampler import upsample_latents
from ltx2_tuner.sampling.conditioning import Conditioning
from ltx2_tuner.sampling.guidance import NEUTRAL
from ltx2_tuner.sampling.options import Request, TwoStageOptions

logger = logging.getLogger(__name__)


def first_stage(request: Request, conditioning: Conditioning) -> tuple[Request, Conditioning]:
    """The request at half size, with its image at that size.

    An image that was cached at full size alone is shrunk as latents.
    """
    image = conditioning.small_image
    if image is None and conditioning.image is not None:
        image = torch.nn.functional.interpolate(conditioning.image[:, :, 0], scale_factor=0.5, mode="bilinear")
        image = image[:, :, None]  # (1, C, 1, H / 2, W / 2)
    small = dataclasses.replace(request, width=request.width // 2, height=request.height // 2)
    return small, dataclasses.replace(conditioning, image=image)


def second_stage(request: Request) -> Request:
    """The request without any guidance: the second stage follows the positive prompt alone."""
    return dataclasses.replace(request, video=NEUTRAL, audio=NEUTRAL)


class Refiner:
    """What lies between and in the second stage: the upsampler and the distilled LoRA.

    Both are read when first needed and wait on the CPU between uses.

    Args:
        vae: file with the video autoencoder, whose statistics normalise the latents.
        dtype: what the distilled LoRA multiplies in.
    """

    def __init__(self, options: TwoStageOptions, vae: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.options = options
        self._vae = vae
        self._device = device
        self._dtype = dtype
        self._upsampler: torch.nn.Module | None = None
        self._distilled: LoRANetwork | None = None

    def upsample(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (1, C, F, H, W) at twice the height and width, float32."""
        if self._upsampler is None:
            self._upsampler = load_spatial_upsampler(self.options.upsampler, "cpu", torch.float32)
            self._statistics = load_latent_statistics(self._vae, self._device)
        upsampler = self._upsampler.to(self._device)
        try:
            return upsample_latents(upsampler, latents.float(), self._statistics)
        finally:
            upsampler.to("cpu")

    @contextlib.contextmanager
    def distilled(self, transformer: LTXTransformer) -> Iterator[None]:
        """The distilled LoRA at full strength within the block, beside whatever is attached already."""
        if self.options.distilled_lora is None:
            yield
            return
        if self._distilled is None:
            lora = load_lora(self.options.distilled_lora, table_of(transformer))
            self._distilled = LoRANetwork.from_file(transformer, lora).requires_grad_(False).eval().to(self._dtype)
        network = self._distilled.to(self._device).attach(transformer)
        try:
            yield
        finally:
            network.detach()
            network.to("cpu")
