"""From source files to training items: windows, buckets, names of cache files.

What width and height in a cache name mean depends on the kind of dataset: the source picture for images, the bucket
for video items, the dataset's resolution for sound.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ltx2_tuner.data import cache_names
from ltx2_tuner.data.buckets import Size, bucket_step, reference_size, select_bucket
from ltx2_tuner.data.companions import References, SoundFinder
from ltx2_tuner.data.config import DEFAULT_FPS, Dataset
from ltx2_tuner.data.extraction import Window, windows
from ltx2_tuner.data.frame_rate import FrameRate, detection_line, resampling_line
from ltx2_tuner.data.probing import Measured, Probe, measure, probe_clip
from ltx2_tuner.data.sources import Failure, Source, SourceList, list_sources
from ltx2_tuner.errors import UserError
from ltx2_tuner.media.resize import lost_area

logger = logging.getLogger(__name__)

MUCH_CROPPED = 0.15  # share of a picture above which its crop is worth a warning


@dataclass(frozen=True)
class Item:
    """One training item and every path that caching reads or writes for it.

    key: stem, and for video items the window. kind: image, video or audio. start, frames: window in output frames
    (0 and 1 for images; 0 and 0 for sound, whose length is known when it is decoded). rate: frame rate of the clip.
    bucket: pixels (width, height) that are encoded. source_size: pixels of the upright source, None for sound.
    name_size: width and height in the file names. sound: file that holds the sound (a clip may have no track).
    reference, reference_audio: source files; reference_path, reference_audio_path: where their caches go;
    reference_bucket: pixels of the encoded reference.
    """

    key: str
    kind: str
    source: Source
    start: int
    frames: int
    rate: FrameRate
    bucket: Size
    source_size: Size | None
    name_size: Size
    latent_path: Path
    audio_path: Path
    text_path: Path
    dino_path: Path
    sound: Path | None = None
    reference: Path | None = None
    reference_path: Path | None = None
    reference_bucket: Size | None = None
    reference_audio: Path | None = None
    reference_audio_path: Path | None = None

    @property
    def stem(self) -> str:
        return self.source.stem

    @property
    def caption(self) -> str:
        return self.source.caption

    @property
    def source_frames(self) -> list[int]:
        """Indices of the source frames to read, in order (they repeat where the target rate is higher)."""
        return self.rate.source_indices(self.start, self.frames)

    @property
    def sound_span(self) -> tuple[float, float]:
        """Start and end of the item in source time, in seconds."""
        step = self.rate.frame_seconds
        return self.start * step, (self.start + self.frames) * step


@dataclass
class ItemList:
    """The items of a dataset, in source order, and what was left out.

    too_short: (name, output frames) of clips shorter than every target. vfr: clips whose frame rate looks variable.
    missing_reference, missing_reference_audio: sources without one, where the dataset has a place for them.
    crops: per bucket the share of each picture, 0 to 1, that its crop cuts away. lost_frames: clips that keep less
    than half of their frames after resampling.
    """

    sources: SourceList
    items: list[Item] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    too_short: list[tuple[str, int]] = field(default_factory=list)
    vfr: list[str] = field(default_factory=list)
    missing_reference: list[str] = field(default_factory=list)
    missing_reference_audio: list[str] = field(default_factory=list)
    crops: dict[Size, list[float]] = field(default_factory=dict)
    lost_frames: list[str] = field(default_factory=list)


def list_items(
    dataset: Dataset,
    *,
    reference_downscale: int = 1,
    sound: SoundFinder | None = None,
    audio_extension: str = ".wav",
    probe: Probe = probe_clip,
    map_with: Callable = map,
    sources: SourceList | None = None,
) -> ItemList:
    """The items of a dataset. Sources that cannot be read are reported in the result, not raised.

    Args:
        sound: where sound comes from; None when no sound is cached (mode video).
        audio_extension: preferred extension of reference sound.
        probe: looks into a clip; importable by name when `map_with` uses processes.
        map_with: `map`, or the `imap` of a pool.
        sources: of an earlier `list_sources` of the same dataset.

    Raises:
        UserError: nothing found, stems that clash, or references configured and not one found.
    """
    found = ItemList(sources or list_sources(dataset))
    found.failures += found.sources.failures
    accepted = found.sources.sources
    maker = _ItemMaker(dataset, reference_downscale, sound, References(dataset, accepted, audio_extension))
    look = partial(measure, dataset=dataset, probe=probe)
    longest = 0
    for source, measured in zip(accepted, map_with(look, accepted)):
        if isinstance(measured, Failure):
            found.failures.append(measured)
            continue
        try:
            made, output_frames = maker.make(source, measured)
        except UserError as error:
            found.failures.append(Failure(source.path.name, str(error)))
            continue
        longest = max(longest, output_frames)
        if not made:
            found.too_short.append((source.path.name, output_frames))
        found.items += made
        _note(found, dataset, source, measured, made, output_frames)
    _check_references(found, dataset, maker.references)
    _log_summary(found, dataset, longest)
    return found


class _ItemMaker:
    """Makes the items of one source after another."""

    def __init__(
        self, dataset: Dataset, reference_downscale: int, sound: SoundFinder | None, references: References
    ) -> None:
        self.dataset = dataset
        self.downscale = reference_downscale
        self.sound = sound
        self.references = references
        self.step = bucket_step(references.pictures, reference_downscale)

    def make(self, source: Source, measured: Measured) -> tuple[list[Item], int]:
        """The items of a source, and how many output frames it has.

        Raises:
            UserError: the source fits no bucket.
        """
        dataset = self.dataset
        if dataset.item_kind == "audio":
            rate = FrameRate(None, DEFAULT_FPS)
            return [self._item(source, measured, Window(0, 0), rate, dataset.resolution, dataset.resolution)], 0
        bucket = select_bucket(
            measured.size,
            dataset.resolution,
            step=self.step,
            enabled=dataset.enable_bucket,
            no_upscale=dataset.bucket_no_upscale,
        )
        if dataset.item_kind == "image":
            rate = FrameRate(None, DEFAULT_FPS)
            return [self._item(source, measured, Window(0, 1), rate, bucket, measured.size)], 1
        rate = FrameRate(dataset.source_fps or measured.fps, dataset.target_fps)
        count = rate.output_count(measured.frames)
        cuts = windows(
            dataset.frame_extraction,
            count,
            dataset.target_frames,
            stride=dataset.frame_stride,
            sample=dataset.frame_sample,
            max_frames=dataset.max_frames,
        )
        return [self._item(source, measured, cut, rate, bucket, bucket) for cut in cuts], count

    def _item(
        self, source: Source, measured: Measured, cut: Window, rate: FrameRate, bucket: Size, name_size: Size
    ) -> Item:
        dataset = self.dataset
        key = cache_names.video_key(source.stem, *cut) if dataset.item_kind == "video" else source.stem
        latent = dataset.cache_directory / cache_names.latent_name(key, *name_size)
        audio = cache_names.audio_path(latent)
        reference = self.references.picture(source)
        reference_audio = self.references.sound(source)
        return Item(
            key=key,
            kind=dataset.item_kind,
            source=source,
            start=cut.start,
            frames=cut.count,
            rate=rate,
            bucket=bucket,
            source_size=measured.size,
            name_size=name_size,
            latent_path=latent,
            audio_path=audio,
            text_path=dataset.cache_directory / cache_names.text_name(source.stem),
            dino_path=cache_names.dino_path(latent),
            sound=self.sound.find(source) if self.sound and dataset.kind != "image" else None,
            reference=reference,
            reference_path=dataset.reference_cache_directory / latent.name if reference else None,
            reference_bucket=reference_size(bucket, self.downscale) if reference else None,
            reference_audio=reference_audio,
            reference_audio_path=dataset.reference_audio_cache_directory / audio.name if reference_audio else None,
        )


def _note(
    found: ItemList, dataset: Dataset, source: Source, measured: Measured, made: list[Item], output_frames: int
) -> None:
    """Log and count what is worth knowing about one source."""
    name = source.path.name
    if measured.size and made:
        share = lost_area(*measured.size, *made[0].bucket)
        found.crops.setdefault(made[0].bucket, []).append(share)
        if share > MUCH_CROPPED:
            width, height = measured.size
            logger.warning(
                "%s: cropping %dx%d to %dx%d cuts %.0f %%", name, width, height, *made[0].bucket, 100 * share
            )
    if source.form != "video" or dataset.item_kind != "video":
        return
    rate = FrameRate(dataset.source_fps or measured.fps, dataset.target_fps)
    if dataset.source_fps is None and rate.source is not None:
        logger.info(detection_line(rate, name))
        if measured.is_vfr:
            found.vfr.append(name)
            logger.warning("%s: looks like variable frame rate; set source_fps", name)
    if rate.resampled:
        logger.info(resampling_line(rate, name))
        logger.info("%s: %d -> %d frames", name, measured.frames, output_frames)
        if output_frames < measured.frames / 2:
            found.lost_frames.append(name)
    elif rate.source is not None and rate.source != rate.target:
        logger.debug("%s: %.3f FPS is kept and trained as %.3f FPS", name, rate.source, rate.target)


def _check_references(found: ItemList, dataset: Dataset, references: References) -> None:
    """Count sources without references, with the files they may have meant; none at all is a mistake."""
    for wanted, missing, name, attribute, near in (
        (references.pictures, found.missing_reference, "reference_directory", "reference", references.near_picture),
        (
            references.sounds,
            found.missing_reference_audio,
            "reference_audio_directory",
            "reference_audio",
            references.near_sound,
        ),
    ):
        if not wanted or not found.items:
            continue
        without = {item.source.path.name: item.source for item in found.items if getattr(item, attribute) is None}
        missing.extend(without)
        shown = [_with_near(source, near(source)) for source in list(without.values())[:5]]
        if all(getattr(item, attribute) is None for item in found.items):
            raise UserError(
                f"{dataset.label}: not one of {len(without)} sources has a file of the same stem in "
                f"{getattr(dataset, name) or 'its JSONL record'}: {', '.join(shown)}; check {name}"
            )
        if missing:
            logger.warning(
                "%s: missing_reference %d, skipped at training: %s", dataset.label, len(missing), ", ".join(shown)
            )


def _with_near(source: Source, near: Path | None) -> str:
    return f"{source.path.name} (nearest: {near.name})" if near else source.path.name


def _log_summary(found: ItemList, dataset: Dataset, longest: int) -> None:
    """What concerns the dataset as a whole."""
    for bucket, shares in sorted(found.crops.items()):
        mean = 100 * sum(shares) / len(shares)
        logger.info("%s: bucket %dx%d: %d sources, crop cuts %.1f %%", dataset.label, *bucket, len(shares), mean)
    if dataset.item_kind != "video":
        return
    if found.lost_frames:
        logger.info(
            "%s: %d clips lost more than half of their frames by resampling; a higher target_fps keeps them",
            dataset.label,
            len(found.lost_frames),
        )
    if any(item.rate.repeats_frames for item in found.items):
        logger.warning(
            "%s: target_fps %g is above the rate of some clips: frames are repeated; a lower target_fps avoids it",
            dataset.label,
            dataset.target_fps,
        )
    if dataset.frame_extraction != "full" and longest:
        for target in dataset.target_frames:
            if longest < target:
                logger.warning("%s: no clip has ≥ %d frames", dataset.label, target)
