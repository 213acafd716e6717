"""What a latent caching run has to make: for every item the files, their sources and their metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ltx2_tuner.caching.encoders import tile_settings
from ltx2_tuner.caching.pictures import PictureTarget
from ltx2_tuner.caching.placeholders import Geometry
from ltx2_tuner.caching.sound import SoundTarget
from ltx2_tuner.data.buckets import STEP, Size
from ltx2_tuner.data.config import Dataset, DatasetConfig
from ltx2_tuner.data.extraction import latent_frames
from ltx2_tuner.data.frame_rate import FrameRate
from ltx2_tuner.data.items import Item
from ltx2_tuner.data.metadata import audio_metadata, latent_metadata, source_metadata
from ltx2_tuner.data.sources import source_form
from ltx2_tuner.errors import UserError
from ltx2_tuner.media.audio import stated_seconds
from ltx2_tuner.media.video import stated_fps
from ltx2_tuner.models.video_vae.tiling import TileConfig

# Values of one latent cell and of one step of sound, for the disk estimate.
_CHANNELS = 128
_AUDIO_CELLS = 8 * 16

# Sound and pictures whose lengths differ by less than this share are left as they are.
STRETCH_TOLERANCE = 0.01


@dataclass(frozen=True)
class LatentOptions:
    """What is written and what is kept.

    vae_dtype, audio_dtype: of the encoders and of the stored latents. external_sound: sound comes from files beside
    the clips, or in sound_directory, preferably with sound_extension. preserve_timing: never stretch sound. geometry:
    of the placeholders of sound items. batch_size: clips a pass, at most; None leaves it to the datasets. strict: any
    failure counts.
    """

    vae_dtype: torch.dtype = torch.bfloat16
    audio_dtype: torch.dtype = torch.float16
    tiles: TileConfig = field(default_factory=TileConfig)
    external_sound: bool = False
    sound_directory: Path | None = None
    sound_extension: str = ".wav"
    preserve_timing: bool = False
    geometry: Geometry = field(default_factory=Geometry)
    reference_downscale: int = 1
    batch_size: int | None = None
    num_workers: int = 1
    skip_existing: bool = False
    keep_cache: bool = False
    ignore_disk_space: bool = False
    strict: bool = False


@dataclass(frozen=True)
class TargetMaker:
    """Builds targets for one run; the ids are the fingerprints of the two encoders."""

    config: DatasetConfig
    options: LatentOptions
    video_id: str = ""
    audio_id: str = ""

    def picture(self, item: Item) -> PictureTarget:
        """The latent file of an image or video item."""
        return PictureTarget(
            key=item.key,
            path=item.latent_path,
            metadata=latent_metadata(item, component_id=self.video_id, preprocess=self.picture_settings()),
            source=item.source.path,
            form=item.source.form,
            size=item.bucket,
            rate=item.rate,
            start=item.start,
            count=item.frames,
        )

    def sound(self, item: Item, dataset: Dataset) -> SoundTarget:
        """The sound latent file of an item that has a file to take sound from.

        Video items get the span of their frames, stretched where the frames are re-timed; sound items all of it.
        """
        options = self.options
        span = item.sound_span if item.kind == "video" else None
        fits = span is None or options.preserve_timing or abs(item.rate.stretch - 1) <= STRETCH_TOLERANCE
        stretch = 1.0 if fits else item.rate.stretch
        settings = self.sound_settings() | {
            "audio_peak_db": dataset.audio_peak_db,
            "audio_source": "audio_files" if options.external_sound else "video",
            "preserve_audio_timing": options.preserve_timing,
            "span": span,
            "stretch": stretch,
        }
        metadata = audio_metadata(item, seconds=0.0, component_id=self.audio_id, preprocess=settings)
        del metadata["duration_seconds"]
        return SoundTarget(
            item.key, item.audio_path, metadata, item.sound, span, stretch=stretch, peak_db=dataset.audio_peak_db
        )

    def reference(self, item: Item, dataset: Dataset) -> PictureTarget:
        """The reference latent file of an item that has a reference."""
        count, downscale = dataset.reference_frames, self.options.reference_downscale
        start = _reference_start(item, dataset)
        settings = self.picture_settings() | {
            "reference_frames": count,
            "reference_downscale": downscale,
            "reference_follow_crop": dataset.reference_follow_crop,
        }
        metadata = latent_metadata(item, component_id=self.video_id, preprocess=settings)
        for name in ("duration_seconds", "source_fps", "source_size", "source_mtime_ns"):
            metadata.pop(name, None)
        metadata |= source_metadata(item.reference, item.reference_path.parent) | {
            "bucket": "{}x{}".format(*item.reference_bucket),
            "crop_start": str(start),
            "frame_count": str(count),
            "reference_frames": str(count),
            "reference_downscale": str(downscale),
        }
        return PictureTarget(
            key=item.key,
            path=item.reference_path,
            metadata=metadata,
            source=item.reference,
            form=source_form(item.reference),
            size=item.reference_bucket,
            rate=FrameRate(None, item.rate.target),  # as stored, no frame rate conversion
            start=start,
            count=count,
            hold_last=True,
        )

    def reference_sound(self, item: Item) -> SoundTarget:
        """The reference sound latent file of an item that has reference sound: the whole of it, never stretched."""
        metadata = audio_metadata(
            item, seconds=0.0, component_id=self.audio_id, preprocess=self.sound_settings()
        ) | source_metadata(item.reference_audio, item.reference_audio_path.parent)
        del metadata["duration_seconds"]
        return SoundTarget(item.key, item.reference_audio_path, metadata, item.reference_audio)

    def picture_settings(self) -> dict[str, object]:
        """What changes the numbers of a picture latent, beside the item."""
        return {
            "ltx_mode": self.config.mode,
            "vae_dtype": dtype_name(self.options.vae_dtype),
            "tiles": tile_settings(self.options.tiles),
        }

    def sound_settings(self) -> dict[str, object]:
        """What changes the numbers of a sound latent, beside the item."""
        return {"ltx_mode": self.config.mode, "audio_dtype": dtype_name(self.options.audio_dtype)}


def _reference_start(item: Item, dataset: Dataset) -> int:
    """First reference frame: that of the item's own time, where the reference is a clip that follows it."""
    follows = dataset.reference_follow_crop and dataset.reference_frames > 1 and item.start > 0
    if not follows or source_form(item.reference) != "video":
        return 0
    try:
        rate = stated_fps(item.reference)
    except UserError:
        return 0  # decoding will say what is wrong with it
    return round(item.sound_span[0] * rate) if rate else item.start


def expected_sizes(maker: TargetMaker, items: Iterable[Item]) -> dict[Path, int]:
    """Bytes by path of the files that a run which keeps nothing writes for these items."""
    mode, options = maker.config.mode, maker.options
    sizes: dict[Path, int] = {}
    for item in items:
        seconds = _seconds(item)
        if mode != "audio":
            sizes[item.latent_path] = _latent_bytes(item.frames, item.bucket, options.vae_dtype)
            if item.reference_path is not None:
                sizes[item.reference_path] = _latent_bytes(1, item.reference_bucket, options.vae_dtype)
        if mode != "video" and item.sound is not None:
            sizes[item.audio_path] = _AUDIO_CELLS * options.audio_dtype.itemsize * math.ceil(25 * seconds)
    return sizes


def _seconds(item: Item) -> float:
    """Seconds of sound of an item; for sound items as the header of the file says."""
    if item.kind != "audio":
        return item.frames / item.rate.target
    try:
        return stated_seconds(item.sound) if item.sound is not None else 0.0
    except UserError:
        return 0.0


def _latent_bytes(frames: int, size: Size, dtype: torch.dtype) -> int:
    return _CHANNELS * latent_frames(frames) * (size[1] // STEP) * (size[0] // STEP) * dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
