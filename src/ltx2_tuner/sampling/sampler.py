"""Turns settled requests into frames and sound with one transformer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable

import torch

from ltx2_tuner.checkpoint import Checkpoint, load_audio_decoder, load_video_decoder, load_vocoder
from ltx2_tuner.checkpoint.modules import check_present
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.models.transformer.tokens import audio_latent_length, unpatchify_audio, unpatchify_video
from ltx2_tuner.models.video_vae import VideoVAEConfig
from ltx2_tuner.models.video_vae.tiling import TileConfig
from ltx2_tuner.sampling.audio_preview import AudioPreviewError, decode_in_subprocess
from ltx2_tuner.sampling.conditioning import Conditioning
from ltx2_tuner.sampling.contexts import PromptContext
from ltx2_tuner.sampling.decode import decode_frames, decode_waveform
from ltx2_tuner.sampling.denoise import GuidedStream, denoise
from ltx2_tuner.sampling.options import Request, SamplingOptions
from ltx2_tuner.sampling.schedule import DISTILLED_SIGMAS, ltx2_sigmas, stage2_sigmas
from ltx2_tuner.sampling.streams import Grid, audio_stream, video_stream
from ltx2_tuner.sampling.two_stage import Refiner, first_stage, second_stage

logger = logging.getLogger(__name__)

# What decoding falls back to when the whole clip does not fit: small tiles in space and time.
SMALL_TILES = TileConfig(spatial_size=256, spatial_overlap=64, temporal_size=32, temporal_overlap=8)


@dataclasses.dataclass(frozen=True)
class Latents:
    """Denoised latents of one sample: video (1, C, F, H, W), audio (1, C, T, bins); absent streams are None."""

    video: torch.Tensor | None
    audio: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One finished sample.

    Attributes:
        frames: (N, height, width, 3) uint8, or None.
        waveform: (2, samples) float32 in [-1, 1], or None.
        rate: samples per second of the waveform.
    """

    frames: torch.Tensor | None
    waveform: torch.Tensor | None
    rate: int | None


class Sampler:
    """Denoises and decodes. Decoders are read when first needed and wait on the CPU between uses."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: SamplingOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype = torch.bfloat16,
        vae_checkpoint: Checkpoint | None = None,
    ) -> None:
        self.options = options
        self.device = device
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._vae_checkpoint = vae_checkpoint or checkpoint
        self._vae_dtype = vae_dtype
        self._video_decoder: torch.nn.Module | None = None
        self._audio_modules: tuple[torch.nn.Module, torch.nn.Module] | None = None
        if options.makes_video:
            check_present(self._vae_checkpoint, "video_decoder")
        if options.makes_audio:
            check_present(checkpoint, "audio_decoder")
        config = VideoVAEConfig.from_dict(self._vae_checkpoint.config.get("vae", {}))
        self._grid = Grid(config.spatial_scale, config.temporal_scale)
        if options.two_stage is not None:
            self._refiner = Refiner(options.two_stage, self._vae_checkpoint, device, dtype)

    def denoise(
        self,
        transformer: LTXTransformer,
        request: Request,
        context: PromptContext,
        conditioning: Conditioning | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Latents:
        """Run the schedule of one request, in two stages where it says so.

        The noise comes from a CPU generator seeded with the request's seed, video first, so that a sample compares
        across devices.
        """
        conditioning = conditioning or Conditioning()
        generator = torch.Generator().manual_seed(request.seed)
        run = functools.partial(self._stage, transformer, context=context, generator=generator, on_step=on_step)
        if not request.two_stage:
            return run(request, conditioning, self._sigmas(request))
        small, small_conditioning = first_stage(request, conditioning)
        first = run(small, small_conditioning, self._sigmas(request))
        start = dataclasses.replace(first, video=self._refiner.upsample(first.video))
        with self._refiner.distilled(transformer):
            sigmas = stage2_sigmas(self._refiner.options.steps)
            refined = run(second_stage(request), conditioning, sigmas, start=start)
        return dataclasses.replace(refined, audio=first.audio)

    def step_count(self, request: Request) -> int:
        """Euler steps of a request, over all its stages."""
        return request.steps + (self._refiner.options.steps if request.two_stage else 0)

    def _stage(
        self,
        transformer: LTXTransformer,
        request: Request,
        conditioning: Conditioning,
        sigmas: torch.Tensor,
        *,
        context: PromptContext,
        generator: torch.Generator,
        on_step: Callable[[int], None] | None,
        start: Latents | None = None,
    ) -> Latents:
        """One run over a schedule, from noise or from `start` with noise of the first level."""
        video_noise = self._video_noise(transformer, request, generator)
        audio_noise = self._audio_noise(transformer, request, generator)
        if start is not None:
            video_noise = _noised(start.video, video_noise, sigmas[0].item())
            audio_noise = _noised(start.audio, audio_noise, sigmas[0].item())
        video = audio = None
        if video_noise is not None:
            stream = video_stream(
                video_noise,
                request.frame_rate,
                *self._contexts(context.video, context.negative_video, "video"),
                image=self._moved(conditioning.image),
                reference=self._moved(conditioning.reference),
                grid=self._grid,
                clean_timesteps=self.options.clean_timesteps,
            )
            video = GuidedStream(stream, request.video)
        if audio_noise is not None:
            stream = audio_stream(
                audio_noise,
                *self._contexts(context.audio, context.negative_audio, "sound"),
                reference=self._moved(conditioning.reference_audio),
                negative_positions=self.options.audio_ref_negative_positions,
            )
            audio = GuidedStream(stream, request.audio)
        with self._autocast(), self._attention(transformer):
            video_tokens, audio_tokens = denoise(transformer, video, audio, sigmas, dtype=self.dtype, on_step=on_step)
        return Latents(
            None if video_noise is None else unpatchify_video(video_tokens, *video_noise.shape[2:]),
            None if audio_noise is None else unpatchify_audio(audio_tokens, audio_noise.shape[1], audio_noise.shape[3]),
        )

    def decode(self, latents: Latents, request: Request) -> Sample:
        """Frames and sound of denoised latents; sound is cut or padded to the length of the picture.

        Sound that cannot be decoded is left out with a warning where there are frames.

        Raises:
            AudioPreviewError, ArithmeticError: it cannot be decoded and is all that was asked for.
        """
        frames = self._decode_video(latents.video) if latents.video is not None else None
        waveform = rate = None
        if latents.audio is not None and self.options.makes_audio:
            try:
                waveform, rate = self._decode_audio(latents.audio)
            except (AudioPreviewError, ArithmeticError) as error:
                if frames is None:
                    raise
                logger.warning("sample %d has no sound: %s", request.index, error)
            else:
                length = round(request.seconds * rate)
                waveform = torch.nn.functional.pad(waveform[:, :length], (0, max(length - waveform.shape[1], 0)))
        return Sample(frames, waveform, rate)

    def _video_noise(self, transformer, request: Request, generator: torch.Generator) -> torch.Tensor | None:
        if not self.options.makes_video:
            return None
        grid = self._grid
        shape = (
            1,
            transformer.config.in_channels,
            (request.frames - 1) // grid.temporal + 1,
            request.height // grid.spatial,
            request.width // grid.spatial,
        )
        return torch.randn(shape, generator=generator).to(self.device)

    def _audio_noise(self, transformer, request: Request, generator: torch.Generator) -> torch.Tensor | None:
        if self.options.mode == "video" or transformer.variant == "video":
            return None
        channels = self._checkpoint.config["audio_vae"]["model"]["params"]["ddconfig"]["z_channels"]
        bins = transformer.config.audio_in_channels // channels
        shape = (1, channels, max(audio_latent_length(request.seconds), 1), bins)
        return torch.randn(shape, generator=generator).to(self.device)

    def _contexts(
        self, positive: torch.Tensor | None, negative: torch.Tensor | None, name: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if positive is None:
            raise ValueError(f"the prompt has no text context for the {name}")
        return self._moved(positive), self._moved(negative)

    def _moved(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(self.device)

    def _sigmas(self, request: Request) -> torch.Tensor:
        if self.options.distilled and request.steps == len(DISTILLED_SIGMAS) - 1:
            return torch.tensor(DISTILLED_SIGMAS)
        return ltx2_sigmas(request.steps)

    def _attention(self, transformer: LTXTransformer) -> contextlib.AbstractContextManager:
        return transformer.attention_backend("sdpa") if self.options.torch_attention else contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _decode_video(self, latents: torch.Tensor) -> torch.Tensor:
        if self._video_decoder is None:
            self._video_decoder = load_video_decoder(self._vae_checkpoint, torch.device("cpu"), self._vae_dtype)
        decoder = self._video_decoder.to(self.device)
        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                return decode_frames(decoder, latents, self.options.tiles)
            # Out here, what the failed attempt held has been released.
            logger.warning(
                "out of memory while decoding; trying again in small tiles (--sample_tiled_vae does so at once)"
            )
            torch.cuda.empty_cache()
            return decode_frames(decoder, latents, SMALL_TILES)
        finally:
            decoder.to("cpu")

    def _decode_audio(self, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self.options.audio_subprocess:
            return decode_in_subprocess(self._checkpoint.path, latents)
        if self._audio_modules is None:
            cpu = torch.device("cpu")
            decoder = load_audio_decoder(self._checkpoint, cpu, torch.float32)
            self._audio_modules = decoder, load_vocoder(self._checkpoint, cpu, torch.float32)
        decoder, vocoder = (module.to(self.device) for module in self._audio_modules)
        try:
            return decode_waveform(decoder, vocoder, latents), vocoder.output_rate
        finally:
            for module in self._audio_modules:
                module.to("cpu")


def _noised(clean: torch.Tensor | None, noise: torch.Tensor | None, sigma: float) -> torch.Tensor | None:
    """Latents at a noise level; an absent stream stays absent."""
    return None if noise is None else (1 - sigma) * clean + sigma * noise
