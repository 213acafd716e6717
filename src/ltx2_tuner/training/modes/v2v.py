"""In-context training (IC-LoRA): a clean reference video in front of the noisy target."""

from __future__ import annotations

import dataclasses

import torch

from ltx2_tuner.devices import send
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer.tokens import patchify_video, video_positions
from ltx2_tuner.training.modes.streams import StreamTask
from ltx2_tuner.training.modes.video import VideoMode


class V2VMode(VideoMode):
    """Clean reference tokens, then noisy target tokens; the loss counts the target alone."""

    name = "v2v"
    lora_preset = "v2v"

    def condition(self, task: StreamTask, batch: dict, fps: torch.Tensor) -> StreamTask:
        """The task behind the batch's reference.

        Raises:
            UserError: the reference is missing, or not smaller than its target by the run's factor.
        """
        if "ref_latents" not in batch:
            raise UserError(
                f"{batch['item_keys'][0]} has no cached reference; give its dataset a reference_directory and a "
                "reference_cache_directory, and run ltx2_cache_latents.py"
            )
        reference = batch["ref_latents"]["latents"]  # (B, C, F, H, W)
        self._check_size(batch["latents"]["latents"], reference, batch["item_keys"][0])
        return with_reference(task, reference, fps, self.options.reference_downscale)

    def _check_size(self, latents: torch.Tensor, reference: torch.Tensor, item: str) -> None:
        factor = self.options.reference_downscale
        (height, width), (ref_height, ref_width) = latents.shape[-2:], reference.shape[-2:]
        if (ref_height * factor, ref_width * factor) != (height, width):
            raise UserError(
                f"{item}: the target latent is {width}x{height} and its reference {ref_width}x{ref_height}, but "
                f"--reference_downscale is {factor}; give the factor that the references were cached with, or cache "
                "them again"
            )


def with_reference(task: StreamTask, reference: torch.Tensor, fps: torch.Tensor, downscale: int) -> StreamTask:
    """Put a clean reference video (B, C, F, H, W) in front of the target tokens.

    Its grid starts at 0 like the target's, with height and width scaled up by `downscale`. fps (B,).
    """
    batch, _, frames, height, width = reference.shape
    device = task.latent.device
    tokens = patchify_video(send(reference, device, torch.float32))
    count = tokens.shape[1]
    rate = send(fps.float(), device)
    positions = video_positions(frames, height, width, rate, batch=batch, downscale=downscale, device=device)
    clean = ~task.mask if task.clean is None else task.clean
    return dataclasses.replace(
        task,
        latent=torch.cat([tokens, task.latent], dim=1),
        positions=torch.cat([positions, task.positions], dim=2),
        clean=torch.cat([clean.new_ones(batch, count), clean], dim=1),
        first_output=count,
    )
