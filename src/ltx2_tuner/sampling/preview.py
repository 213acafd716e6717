"""Samples during training, and the files a sample becomes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ltx2_tuner.errors import UserError
from ltx2_tuner.media.write import write_image, write_video, write_wav
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.sampling.conditioning import Conditioning, hold_last, reference_frames
from ltx2_tuner.sampling.contexts import PromptContext
from ltx2_tuner.sampling.decode import looks_empty
from ltx2_tuner.sampling.options import Request, SamplingOptions
from ltx2_tuner.sampling.sampler import Sample, Sampler
from ltx2_tuner.version import toolkit_version

logger = logging.getLogger(__name__)


def settings_of(request: Request) -> str:
    """How a sample was made, as JSON: what another run has to be told to make the same. Media by file name alone."""
    prompt = request.prompt
    media = {"image": prompt.image_path, "reference": prompt.v2v_ref_path, "reference_audio": prompt.ref_audio_path}
    values = {
        "prompt": prompt.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "frame_rate": request.frame_rate,
        "two_stage": request.two_stage,
        "video": dataclasses.asdict(request.video),
        "audio": dataclasses.asdict(request.audio),
        **{name: Path(path).name for name, path in media.items() if path},
        "tool": f"ltx2-tuner {toolkit_version()}",
    }
    return json.dumps(values, ensure_ascii=False)


def write_sample(
    sample: Sample, request: Request, stem: Path, *, merge_audio: bool = False, settings: bool = True
) -> list[Path]:
    """Write `.mp4` (or `.png` for one frame), `.wav`, and `_av.mp4` when asked; returns the paths.

    Args:
        stem: path without its extension.
        settings: clips and pictures say in their comment how they were made.
    """
    comment = settings_of(request) if settings else None
    written: list[Path] = []

    def path(ending: str) -> Path:
        written.append(stem.with_name(stem.name + ending))
        return written[-1]

    frames = None if sample.frames is None else sample.frames.numpy()
    sound = None if sample.waveform is None else (sample.waveform.numpy(), sample.rate)
    if frames is not None:
        if len(frames) == 1:
            write_image(path(".png"), frames[0], comment)
        else:
            write_video(path(".mp4"), frames, request.frame_rate, comment=comment)
    if sound is not None:
        write_wav(path(".wav"), *sound)
        if frames is not None and len(frames) > 1 and merge_audio:
            write_video(path("_av.mp4"), frames, request.frame_rate, audio=sound, comment=comment)
    return written


def beside_reference(sample: Sample, request: Request, options: SamplingOptions) -> Sample:
    """The sample with its reference video left of it, held on its last frame; as it is without a reference."""
    if sample.frames is None or not request.prompt.v2v_ref_path:
        return sample
    frames = sample.frames.numpy()
    try:
        reference = reference_frames(request.prompt.v2v_ref_path, request.width, request.height, options)
    except UserError as error:
        logger.warning("sample %d is shown without its reference: %s", request.index, error)
        return sample
    both = np.concatenate((hold_last(reference, len(frames)), frames), axis=2)
    return dataclasses.replace(sample, frames=torch.from_numpy(both))


class Previewer:
    """Makes the samples of a prompt file with the transformer in its present state.

    Everything the prompts need (text contexts, conditioning latents) is made before, so that neither Gemma nor the
    encoder is in memory while training.
    """

    def __init__(
        self,
        sampler: Sampler,
        requests: Sequence[Request],
        contexts: Sequence[PromptContext],
        conditionings: Sequence[Conditioning] | None = None,
        *,
        output_dir: str | Path,
        output_name: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        everything = zip(requests, contexts, conditionings or [Conditioning()] * len(requests))
        self._jobs = list(everything)[rank::world_size]
        self._sampler = sampler
        self._folder = Path(output_dir) / "sample"
        self._name = output_name

    @property
    def offloads(self) -> bool:
        """Whether the transformer leaves the device while samples are decoded."""
        return self._sampler.options.offload

    def sample(
        self,
        transformer: LTXTransformer,
        *,
        step: int,
        epoch: int | None = None,
        label: str = "",
        on_sample: Callable[[int, list[Path], Sample], None] | None = None,
    ) -> list[Path]:
        """Make every sample of this process; one that fails is logged and the others are made.

        Args:
            step: optimizer steps done, for the file name.
            epoch: finished epoch, when called at the end of one.
            label: stands after the output name.
            on_sample: called with (index, files, sample), for trackers.

        Returns:
            The files written. Random states, the transformer's mode and its device are as before.
        """
        written: list[Path] = []
        with preserved_state(transformer):
            for request, context, conditioning in self._jobs:
                if conditioning.failed:
                    continue
                try:
                    sample = self.make(transformer, request, context, conditioning)
                    files = self._write(sample, request, step, epoch, label)
                except Exception:  # a preview must never end a training run
                    logger.exception("sample %d failed; training goes on", request.index)
                    release_memory()
                    continue
                written += files
                if on_sample is not None:
                    on_sample(request.index, files, sample)
        return written

    def make(
        self, transformer: LTXTransformer, request: Request, context: PromptContext, conditioning: Conditioning
    ) -> Sample:
        """Denoise and decode one request."""
        sampler = self._sampler
        if sampler.options.offload:
            transformer.to(sampler.device)
        with tqdm(total=sampler.step_count(request), desc=f"sample {request.index}", unit="step", leave=False) as bar:
            latents = sampler.denoise(transformer, request, context, conditioning, on_step=lambda _: bar.update())
        if sampler.options.offload:
            transformer.to("cpu")
            release_memory()
        sample = sampler.decode(latents, request)
        if sample.frames is not None:
            if looks_empty(sample.frames):
                logger.warning(
                    "sample %d is one flat colour: the adapter or the checkpoint may be broken", request.index
                )
            if sampler.options.include_reference:
                sample = beside_reference(sample, request, sampler.options)
        return sample

    def _write(self, sample: Sample, request: Request, step: int, epoch: int | None, label: str) -> list[Path]:
        when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        now = time.strftime("%Y%m%d%H%M%S")
        stem = self._folder / f"{self._name}{label}_{when}_{request.index:02d}_{now}_{request.seed}"
        return write_sample(sample, request, stem, merge_audio=self._sampler.options.merge_audio)


@contextlib.contextmanager
def preserved_state(transformer: LTXTransformer) -> Iterator[None]:
    """Eval mode inside; random states, device and train mode as before outside."""
    was_training = transformer.training
    device = next(transformer.parameters()).device
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    transformer.eval()
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        transformer.to(device)
        transformer.train(was_training)
        release_memory()


def release_memory() -> None:
    """Give cached device memory back to the driver."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
