"""What a run samples with, and how a prompt's own options and the run's defaults become one request."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from ltx2_tuner.models.video_vae.tiling import TileConfig
from ltx2_tuner.sampling.guidance import NEUTRAL, Guidance
from ltx2_tuner.sampling.prompts import SamplePrompt

logger = logging.getLogger(__name__)

# A short list of what nobody wants, for the presets that come with one.
DEFECTS = (
    "blurry, out of focus, low detail, washed out colours, overexposed, compression artifacts, flicker, jitter, "
    "distorted face, deformed hands, extra limbs, text, logo, watermark, robotic voice, muffled sound, clipping, "
    "background hiss, echo, sound out of sync"
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """One set of sampling defaults."""

    steps: int
    video: Guidance
    audio: Guidance
    negative_prompt: str = ""


def _official(steps: int, block: int | None, video_rescale: float, audio_rescale: float) -> Preset:
    stg = 0.0 if block is None else 1.0
    blocks = () if block is None else (block,)
    return Preset(
        steps,
        Guidance(cfg=3.0, stg=stg, modality=3.0, rescale=video_rescale, stg_blocks=blocks),
        Guidance(cfg=7.0, stg=stg, modality=3.0, rescale=audio_rescale, stg_blocks=blocks),
        DEFECTS,
    )


PRESETS = {
    "legacy": Preset(20, NEUTRAL, NEUTRAL),
    "ltx20": _official(40, 29, 0.7, 0.7),
    "ltx23": _official(30, 28, 0.7, 0.7),
    "ltx23_hq": _official(15, None, 0.45, 1.0),
    "distilled_two_stage": Preset(8, NEUTRAL, NEUTRAL),
}
STG_BLOCKS = {"2.0": (29,), "2.3": (28,)}


@dataclasses.dataclass(frozen=True)
class GuidanceOverrides:
    """Guidance scales typed on the command line; None leaves the preset's or the default."""

    video_cfg: float | None = None
    audio_cfg: float | None = None
    video_modality: float | None = None
    audio_modality: float | None = None
    video_rescale: float | None = None
    audio_rescale: float | None = None
    stg: float | None = None
    stg_blocks: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TwoStageOptions:
    """Half size first, then refined at full size. distilled_lora: active in the second stage alone, or None."""

    upsampler: Path
    distilled_lora: Path | None = None
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The run's defaults; sizes in pixels, rates in frames per second. torch_attention: whatever backend training uses.

    strategy: none, v2v or audio_ref_only_ic, which decides what references count; None takes those that the mode can
    use.
    """

    mode: str = "video"
    version: str = "2.3"
    width: int = 768
    height: int = 512
    frames: int = 45
    frame_rate: float = 25.0
    steps: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    preset: str | None = None
    overrides: GuidanceOverrides = GuidanceOverrides()
    distilled: bool = False
    tiles: TileConfig | None = None
    offload: bool = False
    merge_audio: bool = False
    audio_only: bool = False
    disable_audio: bool = False
    audio_subprocess: bool = True
    clean_timesteps: bool = True
    torch_attention: bool = False
    include_reference: bool = False
    strategy: str | None = None
    two_stage: TwoStageOptions | None = None
    reference_downscale: int = 1
    reference_frames: int = 1
    audio_ref_negative_positions: bool = False
    audio_ref_identity_guidance: float = 0.0

    @property
    def makes_video(self) -> bool:
        return self.mode != "audio" and not self.audio_only

    @property
    def makes_audio(self) -> bool:
        return self.mode != "video" and not self.disable_audio


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample to make, every value settled."""

    index: int
    prompt: SamplePrompt
    width: int
    height: int
    frames: int
    frame_rate: float
    steps: int
    seed: int
    video: Guidance
    audio: Guidance
    negative_prompt: str
    two_stage: bool = False

    @property
    def seconds(self) -> float:
        return self.frames / self.frame_rate

    @property
    def needs_negative(self) -> bool:
        return self.video.cfg != 1 or self.audio.cfg != 1


def settle(index: int, prompt: SamplePrompt, options: SamplingOptions, *, num_blocks: int = 48) -> Request:
    """The request a prompt makes: its own options first, then the command line, the preset, the defaults.

    Sizes are floored to whole latent cells and the frame count to 8n + 1, with one line each when that changes them.
    """
    prompt = _with_usable_references(index, prompt, options)
    two_stage = options.two_stage is not None and options.makes_video
    if two_stage and prompt.ref_audio_path:
        logger.warning("sample %d: two stages do not go with reference sound; it is made in one", index)
        two_stage = False
    multiple = 64 if two_stage else 32 * (options.reference_downscale if prompt.v2v_ref_path else 1)
    width = _floor(prompt.width or options.width, multiple, "width")
    height = _floor(prompt.height or options.height, multiple, "height")
    wanted = prompt.frame_count or options.frames
    frames = (wanted - 1) // 8 * 8 + 1
    if frames != wanted:
        logger.warning("sample %d: %d frames is not 8n+1, %d are made", index, wanted, frames)
    preset = PRESETS.get(options.preset or "", Preset(20, NEUTRAL, NEUTRAL))
    video, audio = _guidance(prompt, options, preset, num_blocks)
    return Request(
        index=index,
        prompt=prompt,
        width=width,
        height=height,
        frames=frames,
        frame_rate=prompt.frame_rate or options.frame_rate,
        steps=prompt.sample_steps or options.steps or preset.steps,
        seed=options.seed if prompt.seed is None else prompt.seed,
        video=video,
        audio=audio,
        negative_prompt=prompt.negative_prompt or preset.negative_prompt,
        two_stage=two_stage,
    )


def _with_usable_references(index: int, prompt: SamplePrompt, options: SamplingOptions) -> SamplePrompt:
    """The prompt without references that the mode, the strategy or two stages cannot use, with a line for each."""
    reasons = {"v2v_ref_path": None, "ref_audio_path": None}
    if options.mode != "video":
        reasons["v2v_ref_path"] = "needs --ltx2_mode video"
    elif options.strategy not in (None, "v2v"):
        reasons["v2v_ref_path"] = "needs --ic_lora_strategy v2v"
    elif options.two_stage is not None:
        reasons["v2v_ref_path"] = "does not go with --sample_two_stage"
    if options.mode == "video":
        reasons["ref_audio_path"] = "needs --ltx2_mode av or audio"
    elif options.strategy not in (None, "audio_ref_only_ic"):
        reasons["ref_audio_path"] = "needs --ic_lora_strategy audio_ref_only_ic"
    for key, reason in reasons.items():
        if reason and getattr(prompt, key):
            logger.warning("sample %d: its reference %s is ignored, it %s", index, getattr(prompt, key), reason)
            prompt = dataclasses.replace(prompt, **{key: None})
    return prompt


def _floor(value: int, multiple: int, name: str) -> int:
    floored = max(value // multiple * multiple, multiple)
    if floored != value:
        logger.warning("sample %s %d is no multiple of %d, %d is used", name, value, multiple, floored)
    return floored


def _guidance(
    prompt: SamplePrompt, options: SamplingOptions, preset: Preset, num_blocks: int
) -> tuple[Guidance, Guidance]:
    typed = options.overrides
    asked = prompt.cfg_scale if prompt.cfg_scale is not None else prompt.guidance_scale
    default = 1.0 if options.distilled else 3.0
    run_scale = options.guidance_scale if options.guidance_scale is not None else default

    def cfg(override: float | None, of_preset: float) -> float:
        if asked is not None:
            return asked
        if override is not None:
            return override
        return of_preset if options.preset else run_scale

    def first(*values):
        return next(value for value in values if value is not None)

    def scales(base: Guidance, cfg_scale: float, modality: float | None, rescale: float | None) -> Guidance:
        stg = first(typed.stg, base.stg)
        blocks = first(typed.stg_blocks, base.stg_blocks or None, STG_BLOCKS.get(options.version, ()))
        return Guidance(
            cfg=cfg_scale,
            stg=stg,
            modality=first(modality, base.modality),
            rescale=first(rescale, base.rescale),
            stg_blocks=tuple(min(block, num_blocks - 1) for block in blocks) if stg else (),
        )

    audio_cfg = cfg(typed.audio_cfg, preset.audio.cfg)
    if options.audio_ref_identity_guidance > 0 and prompt.ref_audio_path:
        audio_cfg = options.audio_ref_identity_guidance
    return (
        scales(preset.video, cfg(typed.video_cfg, preset.video.cfg), typed.video_modality, typed.video_rescale),
        scales(preset.audio, audio_cfg, typed.audio_modality, typed.audio_rescale),
    )


def is_distilled(*paths: str | Path) -> bool:
    """Whether a checkpoint or an applied LoRA names itself distilled."""
    return any("distilled" in Path(path).name.lower() for path in paths)
