"""Picture-only training, optionally with a clean reference video in front (IC-LoRA)."""

from __future__ import annotations

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training.draws import Draws
from ltx2_tuner.training.modes.base import Compute, ModeOptions, Prepared, loss_weight
from ltx2_tuner.training.modes.streams import batch_fps, batch_text, video_task, with_reference


class VideoMode:
    """Noisy picture tokens, no sound stream."""

    name = "video"

    def __init__(self, options: ModeOptions, compute: Compute) -> None:
        self.options = options
        self.compute = compute
        self.lora_preset = "v2v" if options.reference else "t2v"

    def prepare(self, batch: dict, draws: Draws) -> Prepared:
        latents = batch["latents"]["latents"]  # (B, C, F, H, W)
        count = len(latents)
        fps = batch_fps(batch, count)
        text = batch_text(batch, draws.caption_dropout(count), self.compute.blank)
        first_frame = draws.first_frame(count)
        sigma = draws.sigma(video_tokens(latents), batch_buckets(batch))
        noise = draws.noise((count, latents[0, 0].numel(), latents.shape[1]))
        task = video_task(latents, fps, sigma, noise, first_frame)
        if self.options.reference:
            reference = batch["ref_latents"]["latents"]
            self._check_downscale(latents, reference, batch)
            task = with_reference(task, reference, fps, self.options.reference_downscale)
        return Prepared(
            video=self.compute.modality(task, text.video, text.mask),
            audio=None,
            video_task=task,
            audio_task=None,
            video_weight=loss_weight(batch, "video", self.options.video_weight),
            audio_weight=0.0,
            has_audio=False,
        )

    def _check_downscale(self, latents: torch.Tensor, reference: torch.Tensor, batch: dict) -> None:
        wanted = self.options.reference_downscale
        (height, width), (ref_height, ref_width) = latents.shape[-2:], reference.shape[-2:]
        if (ref_height * wanted, ref_width * wanted) != (height, width):
            raise UserError(
                f"{batch['item_keys'][0]}: the target latent is {width}x{height} and its reference {ref_width}x"
                f"{ref_height}, but --reference_downscale is {wanted}; give the factor that the references were "
                "cached with, or cache them again"
            )


def video_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) of each sample of latents (B, C, F, H, W)."""
    return torch.full((len(latents),), latents[0, 0].numel())


def batch_buckets(batch: dict) -> torch.Tensor | None:
    """Stratified values (B,) of --num_timestep_buckets, None without."""
    values = batch.get("timesteps")
    return None if values is None else torch.tensor(values, dtype=torch.float32)
