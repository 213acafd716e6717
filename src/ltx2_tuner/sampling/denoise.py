"""The Euler loop: up to four passes a step, guidance on x0, clean tokens put back after every prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ltx2_tuner.models.transformer import LTXTransformer, Modality, Perturbations
from ltx2_tuner.sampling.guidance import NEUTRAL, Guidance, euler_step, guide, to_x0
from ltx2_tuner.sampling.streams import Stream


@dataclasses.dataclass(frozen=True)
class GuidedStream:
    """A stream and the guidance scales of its modality."""

    stream: Stream
    guidance: Guidance = NEUTRAL


@torch.no_grad()
def denoise(
    transformer: LTXTransformer,
    video: GuidedStream | None,
    audio: GuidedStream | None,
    sigmas: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Run the whole schedule and return the target tokens of both streams, (1, T, C) float32.

    Args:
        transformer: in eval mode, on the streams' device.
        sigmas: (steps + 1,) noise levels, the last one 0.
        dtype: compute dtype of the model call; the state stays float32.
        on_step: called with the number of finished steps.
    """
    streams = {"video": video, "audio": audio}
    streams = {name: stream for name, stream in streams.items() if stream is not None}
    state = {name: guided.stream.start() for name, guided in streams.items()}
    for index, (sigma, next_sigma) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:])):
        predictions = _predict(transformer, streams, state, sigma, dtype)
        for name, x0 in predictions.items():
            stream = streams[name].stream
            state[name] = stream.lock(euler_step(state[name], stream.lock(x0), sigma, next_sigma))
        if on_step is not None:
            on_step(index + 1)
    result = {name: state[name][:, guided.stream.target] for name, guided in streams.items()}
    return result.get("video"), result.get("audio")


def _predict(
    transformer: LTXTransformer,
    streams: dict[str, GuidedStream],
    state: dict[str, torch.Tensor],
    sigma: float,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Guided x0 of every stream; passes that no scale asks for are not run."""
    scales = {name: guided.guidance for name, guided in streams.items()}

    def run(negative: bool = False, perturbations: Perturbations | None = None) -> dict[str, torch.Tensor]:
        return _run(transformer, streams, state, sigma, dtype, negative=negative, perturbations=perturbations)

    cond = run()
    passes: dict[str, dict[str, torch.Tensor]] = {}
    if any(scale.cfg != 1 for scale in scales.values()):
        passes["uncond"] = run(negative=True)
    bypassed = {f"skip_{name}_self": scale.stg_blocks for name, scale in scales.items() if scale.stg}
    if bypassed:
        passes["perturbed"] = run(perturbations=Perturbations.uniform(1, **bypassed))
    if len(streams) == 2 and any(scale.modality != 1 for scale in scales.values()):
        passes["isolated"] = run(perturbations=Perturbations.uniform(1, skip_a2v="all", skip_v2a="all"))
    guided = {}
    for name, x0 in cond.items():
        target = streams[name].stream.target
        terms = {kind: result[name][:, target] for kind, result in passes.items()}
        guided[name] = x0.clone()
        guided[name][:, target] = guide(x0[:, target], scales[name], **terms)
    return guided


def _run(
    transformer: LTXTransformer,
    streams: dict[str, GuidedStream],
    state: dict[str, torch.Tensor],
    sigma: float,
    dtype: torch.dtype,
    *,
    negative: bool,
    perturbations: Perturbations | None,
) -> dict[str, torch.Tensor]:
    """x0 of one pass."""
    modalities, timesteps = {}, {}
    for name, guided in streams.items():
        stream = guided.stream
        level = torch.full((1,), sigma, device=stream.noise.device)
        timesteps[name] = stream.timesteps(level)
        context = stream.negative_context if negative else stream.context
        if context is None:
            raise ValueError(f"guidance with cfg other than 1 needs a negative context for the {name} stream")
        modalities[name] = Modality(
            latent=state[name].to(dtype),
            sigma=level,
            timesteps=timesteps[name],
            positions=stream.positions,
            context=context.to(dtype),
        )
    velocities = transformer(modalities.get("video"), modalities.get("audio"), perturbations)
    outputs = dict(zip(("video", "audio"), velocities))
    return {name: to_x0(state[name], outputs[name], timesteps[name][..., None]) for name in streams}
