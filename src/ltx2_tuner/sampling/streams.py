"""The tokens of one modality during sampling: what is denoised, what stays clean, and where each token lies.

Legend: T tokens, C channels, S text tokens, F/H/W latent frames, height, width. The batch is always 1.
"""

from __future__ import annotations

import dataclasses

import torch

from ltx2_tuner.models.transformer.tokens import (
    audio_positions,
    patchify_audio,
    patchify_video,
    video_positions,
)


@dataclasses.dataclass(frozen=True)
class Stream:
    """One modality's state at the start of a run.

    Attributes:
        noise: (1, T, C) float32, noise on every token.
        positions: (1, axes, T, 2) float32.
        context: (1, S, D) text context of the positive prompt.
        negative_context: (1, S, D) of the negative prompt; None where no guidance needs it.
        clean: (1, T, C) float32, the content of clean tokens (anything elsewhere); None when no token is clean.
        mask: (1, T, 1) float32, 1 on denoised tokens and 0 on clean ones; None when no token is clean.
        target: the tokens that are the result; reference tokens lie outside.
        clean_timesteps: whether clean tokens are given timestep 0 (else the step's noise level).
    """

    noise: torch.Tensor
    positions: torch.Tensor
    context: torch.Tensor
    negative_context: torch.Tensor | None = None
    clean: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    target: slice = dataclasses.field(default_factory=lambda: slice(None))
    clean_timesteps: bool = True

    def start(self) -> torch.Tensor:
        """(1, T, C): noise where denoised, the clean content elsewhere."""
        return self.lock(self.noise)

    def lock(self, tokens: torch.Tensor) -> torch.Tensor:
        """Put the clean content back."""
        if self.mask is None:
            return tokens
        return tokens * self.mask + self.clean * (1 - self.mask)

    def timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """(1, 1) when every token shares the level, else (1, T)."""
        if self.mask is None or not self.clean_timesteps:
            return sigma[:, None]
        return self.mask[..., 0] * sigma[:, None]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scale factors of the video autoencoder: pixels per latent cell and frames per latent frame."""

    spatial: int = 32
    temporal: int = 8


RELEASED_GRID = Grid()


def video_stream(
    noise: torch.Tensor,
    fps: float,
    context: torch.Tensor,
    negative_context: torch.Tensor | None = None,
    *,
    image: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    grid: Grid = RELEASED_GRID,
    clean_timesteps: bool = True,
) -> Stream:
    """The video stream, with a clean first frame or a clean reference video in front when given.

    Args:
        noise: (1, C, F, H, W) float32.
        fps: frames per second of the time axis.
        context: (1, S, D).
        negative_context: (1, S, D) or None.
        image: (1, C, 1, H, W) latent that replaces latent frame 0.
        reference: (1, C, Fr, Hr, Wr) latent of an in-context reference; H and W must be the same whole multiple of
            Hr and Wr, and the reference's height and width positions are stretched by it.
        clean_timesteps: give the image's tokens timestep 0.
    """
    _, _, frames, height, width = noise.shape
    tokens = patchify_video(noise)
    clean = torch.zeros_like(tokens)
    mask = torch.ones(1, tokens.shape[1], 1, device=noise.device)
    scales = {"spatial_scale": grid.spatial, "temporal_scale": grid.temporal}
    positions = video_positions(frames, height, width, fps, **scales).to(noise.device)
    if image is not None:
        cells = height * width
        clean[:, :cells] = patchify_video(image.to(clean))
        mask[:, :cells] = 0
    target = slice(None)
    if reference is not None:
        factor = reference_factor((height, width), tuple(reference.shape[-2:]))
        reference_tokens = patchify_video(reference.to(clean))
        where = video_positions(*reference.shape[-3:], fps, downscale=factor, **scales).to(noise.device)
        positions = torch.cat((where, positions), dim=2)
        tokens = torch.cat((torch.zeros_like(reference_tokens), tokens), dim=1)
        clean = torch.cat((reference_tokens, clean), dim=1)
        mask = torch.cat((mask.new_zeros(1, reference_tokens.shape[1], 1), mask), dim=1)
        target = slice(reference_tokens.shape[1], None)
    partly_clean = image is not None or reference is not None
    return Stream(
        noise=tokens,
        positions=positions,
        context=context,
        negative_context=negative_context,
        clean=clean if partly_clean else None,
        mask=mask if partly_clean else None,
        target=target,
        clean_timesteps=clean_timesteps or reference is not None,
    )


def reference_factor(target: tuple[int, int], reference: tuple[int, int]) -> int:
    """The whole number by which a reference is smaller than its target.

    Raises:
        ValueError: the two sizes are not the same whole multiple of one another.
    """
    factors = {size / small for size, small in zip(target, reference)}
    factor = factors.pop()
    if factors or factor < 1 or factor != int(factor):
        raise ValueError(f"a target of {target} latent cells is no whole multiple of its reference of {reference}")
    return int(factor)


def audio_stream(
    noise: torch.Tensor,
    context: torch.Tensor,
    negative_context: torch.Tensor | None = None,
    *,
    reference: torch.Tensor | None = None,
    negative_positions: bool = False,
    step_seconds: float = 0.04,
) -> Stream:
    """The sound stream, followed by a clean reference voice when given.

    Args:
        noise: (1, C, Ta, bins) float32.
        reference: (1, C, Tr, bins) latent of the reference.
        negative_positions: place the reference before time 0, its end one latent step before it.
        step_seconds: length of a latent step in seconds.
    """
    length = noise.shape[2]
    tokens = patchify_audio(noise)
    positions = audio_positions(length).to(noise.device)
    if reference is None:
        return Stream(tokens, positions, context, negative_context)
    reference_tokens = patchify_audio(reference.to(tokens))
    where = audio_positions(reference.shape[2]).to(noise.device)
    if negative_positions:
        where = where - where[..., -1:, 1:] - step_seconds
    mask = torch.ones(1, length + reference_tokens.shape[1], 1, device=noise.device)
    mask[:, length:] = 0
    return Stream(
        noise=torch.cat((tokens, torch.zeros_like(reference_tokens)), dim=1),
        positions=torch.cat((positions, where), dim=2),
        context=context,
        negative_context=negative_context,
        clean=torch.cat((torch.zeros_like(tokens), reference_tokens), dim=1),
        mask=mask,
        target=slice(0, length),
    )
