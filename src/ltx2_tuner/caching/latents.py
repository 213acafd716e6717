"""Latent caching: pictures, sound and references of every dataset through the autoencoders, one file each."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx2_tuner.caching import run
from ltx2_tuner.caching.decoding import CRASHED
from ltx2_tuner.caching.encoders import VideoLatents
from ltx2_tuner.caching.ledger import Ledger
from ltx2_tuner.caching.pictures import encode_pictures
from ltx2_tuner.caching.placeholders import write_placeholders
from ltx2_tuner.caching.run import Journal, Tally
from ltx2_tuner.caching.sound import SoundLatents, SoundResult, encode_sound
from ltx2_tuner.caching.targets import LatentOptions, TargetMaker, dtype_name, expected_sizes
from ltx2_tuner.caching.workers import Workers
from ltx2_tuner.checkpoint import Checkpoint, component_id, load_audio_encoder, load_video_encoder
from ltx2_tuner.data import cache_names
from ltx2_tuner.data.cache_files import write_audio
from ltx2_tuner.data.companions import SoundFinder
from ltx2_tuner.data.config import Dataset, DatasetConfig
from ltx2_tuner.data.items import Item, ItemList, list_items
from ltx2_tuner.data.metadata import canonical_json
from ltx2_tuner.data.sources import Failure, Source, list_sources, warn_shared_sources
from ltx2_tuner.media.audio import stated_seconds

logger = logging.getLogger(__name__)

SCRIPT = "latents"
SILENCE_SECONDS = 10.0
UNUSED_SECONDS = 1.0  # at the end of a clip, worth a line


@dataclass(frozen=True)
class Group:
    """A dataset with its items and counts."""

    dataset: Dataset
    found: ItemList
    tally: Tally

    @property
    def items(self) -> list[Item]:
        return self.found.items


def scan(config: DatasetConfig, options: LatentOptions, workers: Workers) -> list[Group]:
    """The items of every dataset, training first; clips are looked into by the workers.

    Raises:
        UserError: a dataset without sources.
    """
    listed = [(dataset, list_sources(dataset)) for dataset in config.all]
    warn_shared_sources(listed)
    sound = None
    if config.mode != "video":
        sound = SoundFinder(options.external_sound, options.sound_directory, options.sound_extension)
    groups = []
    for dataset, sources in listed:
        found = list_items(
            dataset,
            reference_downscale=options.reference_downscale,
            sound=sound,
            audio_extension=options.sound_extension,
            map_with=functools.partial(workers.map, crashed=_crashed),
            sources=sources,
        )
        groups.append(Group(dataset, found, _tally(dataset, found)))
        if dataset.item_kind == "video":
            _log_unused(dataset, found)
    return groups


def _log_unused(dataset: Dataset, found: ItemList) -> None:
    """How much of each clip no item covers: extraction from the head leaves long clips unused, often unnoticed."""
    covered: dict[Path, float] = {}
    for item in found.items:
        if item.source.form == "video":
            covered[item.source.path] = max(covered.get(item.source.path, 0.0), item.sound_span[1])
    unused = 0.0
    for path, end in covered.items():
        seconds = stated_seconds(path)
        if seconds - end > UNUSED_SECONDS:
            unused += seconds - end
            logger.info("%s: %.1f of %.1f s are used", path.name, end, seconds)
    if unused:
        logger.info(
            "%s: %.0f s of the clips are in no item; frame_extraction %s uses more of them",
            dataset.label,
            unused,
            '"full" or "chunk"' if dataset.frame_extraction == "head" else '"chunk"',
        )


def _crashed(source: Source) -> Failure:
    return Failure(source.path.name, CRASHED)


def _tally(dataset: Dataset, found: ItemList) -> Tally:
    """Counts of a dataset before anything is encoded."""
    label = f"{'Validation' if dataset.validation else 'Dataset'} {dataset.index}"
    tally = Tally(label, dataset.cache_directory, found.sources.count, len(found.items))
    named = {
        "no caption": [path.name for path in found.sources.no_caption],
        "empty caption": found.sources.empty_caption,
        "too short": [f"{name} ({frames} frames)" for name, frames in found.too_short],
        "variable frame rate": found.vfr,
        "missing_reference": found.missing_reference,
        "missing_reference_audio": found.missing_reference_audio,
    }
    for reason, names in named.items():
        for name in names:
            tally.add(reason, name)
    for failure in found.failures:
        tally.fail(failure.name, failure.reason)
    return tally


class LatentCaching:
    """One run over a dataset file.

    Args:
        config: datasets; its mode decides which latents are made.
        groups: what `scan` found.
        video: file with the video autoencoder; None in audio mode.
        audio: file with the audio autoencoder; None in video mode.

    Raises:
        UserError: a checkpoint lacks the autoencoder.
    """

    def __init__(
        self,
        config: DatasetConfig,
        groups: list[Group],
        options: LatentOptions,
        workers: Workers,
        video: Checkpoint | None,
        audio: Checkpoint | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.groups = groups
        self.options = options
        self.workers = workers
        self.device = device
        self._video, self._audio = video, audio
        self.component_ids = {}
        for name, checkpoint in (("video_encoder", video), ("audio_encoder", audio)):
            if checkpoint is not None:
                self.component_ids[name] = component_id(checkpoint, name)
        ids = self.component_ids
        self.maker = TargetMaker(config, options, ids.get("video_encoder", ""), ids.get("audio_encoder", ""))

    @functools.cached_property
    def video_latents(self) -> VideoLatents:
        """The video encoder on its device, loaded when first asked for."""
        encoder = load_video_encoder(self._video, self.device, self.options.vae_dtype)
        return VideoLatents(encoder, self.options.tiles)

    @functools.cached_property
    def sound_latents(self) -> SoundLatents:
        """The audio encoder on its device, loaded when first asked for."""
        return SoundLatents(load_audio_encoder(self._audio, self.device, self.options.audio_dtype))

    def run(self) -> int:
        """Encode what is missing, remove orphans, print the summary.

        Returns:
            The exit status of the script.
        """
        for directory in {place for group in self.groups for place in _output_directories(group.dataset)}:
            run.remove_leftovers(directory)
        self._check_disk()
        journal = Journal(self.config.datasets[0].cache_directory, SCRIPT, self._settings())
        ledger = Ledger(journal, self.options.skip_existing)
        try:
            for group in self.groups:
                self._encode_group(group, ledger)
            if self.config.mode == "av":
                self._write_silence(ledger)
        finally:
            journal.close()
        tallies = [group.tally for group in self.groups]
        run.write_reports(tallies, SCRIPT)
        journal.finish()
        self._print_costs()
        for line in run.summary_lines(tallies):
            print(line)
        lost = None if self.config.mode == "video" else "Audio"
        return run.exit_status(tallies, strict=self.options.strict, lost_track=lost)

    def _check_disk(self) -> None:
        sizes = {}
        for group in self.groups:
            sizes |= expected_sizes(self.maker, group.items)
        run.check_disk_space(sizes, self.options.ignore_disk_space)

    def _encode_group(self, group: Group, ledger: Ledger) -> None:
        passes = {"workers": self.workers, "ledger": ledger, "tally": group.tally}
        size = min(group.dataset.batch_size, self.options.batch_size or group.dataset.batch_size)
        if group.dataset.item_kind == "audio":
            sound = self._encode_sound(group, group.items, passes)
            heard = [item for item in group.items if item.audio_path in sound.good]
            settings = self.maker.sound_settings()
            write_placeholders(
                heard, self.options.geometry, self.component_ids["audio_encoder"], settings, ledger, group.tally
            )
        else:
            targets = [self.maker.picture(item) for item in group.items]
            made = encode_pictures(targets, size, load_encoder=self._load_video, **passes)
            sound = SoundResult()
            if self.config.mode == "av":
                sound = self._encode_sound(group, [item for item in group.items if item.latent_path in made], passes)
        self._encode_references(group, size, passes)
        self._remove_orphans(group, sound.without)

    def _encode_sound(self, group: Group, items: list[Item], passes: Mapping) -> SoundResult:
        """The sound of items; those that have no file to take it from are among the ones without."""
        # Both counts are always shown: users look for them.
        group.tally.tracks.setdefault("Audio", Counter({"no audio": 0, "silent": 0}))
        silent = [item for item in items if item.sound is None]
        for item in silent:
            group.tally.add("no audio", item.key, "Audio")
        targets = [self.maker.sound(item, group.dataset) for item in items if item.sound is not None]
        result = encode_sound(targets, load_encoder=self._load_sound, **passes)
        result.without += [item.audio_path for item in silent]
        return result

    def _encode_references(self, group: Group, size: int, passes: Mapping) -> None:
        if self.config.mode != "audio":
            targets = [self.maker.reference(item, group.dataset) for item in group.items if item.reference]
            if targets and self.config.mode == "av":
                logger.warning("%s: references are cached, but v2v training needs mode video", group.tally.label)
            if targets:
                encode_pictures(targets, size, load_encoder=self._load_video, track="Reference", **passes)
        if self.config.mode != "video":
            sounds = [self.maker.reference_sound(item) for item in group.items if item.reference_audio]
            if sounds:
                encode_sound(sounds, load_encoder=self._load_sound, track="Reference audio", **passes)

    def _load_video(self) -> VideoLatents:
        return self.video_latents

    def _load_sound(self) -> SoundLatents:
        return self.sound_latents

    def _settings(self) -> dict[str, object]:
        """What decides the bytes of the files, for the journal."""
        options = dataclasses.asdict(self.options)
        for name in ("num_workers", "keep_cache", "ignore_disk_space", "strict"):
            del options[name]
        return {
            "options": options,
            "components": self.component_ids,
            "mode": self.config.mode,
            "device": self.device.type,
            "datasets": [dataclasses.asdict(dataset) for dataset in self.config.all],
            "members": [str(item.latent_path) for group in self.groups for item in group.items],
        }

    def _write_silence(self, ledger: Ledger) -> None:
        """What training takes for the sound of items without any."""
        path = self.config.datasets[0].cache_directory / cache_names.SILENCE_NAME
        metadata = {
            "component_id": self.component_ids["audio_encoder"],
            "duration_seconds": str(SILENCE_SECONDS),
            "preprocess": canonical_json({"audio_dtype": dtype_name(self.options.audio_dtype)}),
        }
        if not ledger.keeps(path, metadata):
            write_audio(path, self.sound_latents.silence(SILENCE_SECONDS), metadata)
            ledger.wrote(path)

    def _remove_orphans(self, group: Group, gone: list[Path]) -> None:
        """Remove latents without a source, with their sound and features, and sound that its item no longer has."""
        directory, is_audio = group.dataset.cache_directory, group.dataset.item_kind == "audio"
        without = set(gone) if is_audio else set()
        members = [item.latent_path for item in group.items if item.audio_path not in without]
        owned = protected_stems(group)

        def belongs(name: str) -> bool:
            parsed = cache_names.parse_latent_name(name, video=group.dataset.item_kind == "video")
            return parsed is not None and parsed.stem in owned

        orphans = run.find_orphans(directory, cache_names.LATENT_SUFFIX, members, belongs)
        siblings = [
            sibling for path in orphans for sibling in (cache_names.audio_path(path), cache_names.dino_path(path))
        ]
        leftovers = dict.fromkeys(path for path in (*siblings, *gone) if path.is_file())
        run.remove_orphans([*orphans, *leftovers], self.options.keep_cache)

    def _print_costs(self) -> None:
        fallbacks = self.video_latents.fallbacks if "video_latents" in self.__dict__ else []
        if fallbacks:
            print(f"the device memory was too small; encoding went on with {', '.join(fallbacks)}")
        if self.device.type == "cuda":
            print(f"peak GPU memory {run.size_text(torch.cuda.max_memory_allocated(self.device))}")


def _output_directories(dataset: Dataset) -> list[Path]:
    places = (dataset.cache_directory, dataset.reference_cache_directory, dataset.reference_audio_cache_directory)
    return [place for place in places if place is not None]


def protected_stems(group: Group) -> set[str]:
    """Stems whose caches are no orphans: sources that cannot be used this time, and after failures all of them."""
    sources = group.found.sources
    unusable = {path.stem for path in sources.no_caption} | {
        Path(failure.name).stem for failure in group.found.failures
    }
    return unusable | ({source.stem for source in sources.sources} if group.tally.failures else set())
