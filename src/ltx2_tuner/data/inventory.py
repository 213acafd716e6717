"""What the cache directories hold: the list of trainable items, the counts, and messages about what is missing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_tuner.data import cache_names
from ltx2_tuner.data.buckets import STEP, Size
from ltx2_tuner.data.cache_files import CacheHeader, read_header
from ltx2_tuner.data.cache_names import AUDIO_SUFFIX, LATENT_SUFFIX, CacheName
from ltx2_tuner.data.config import Dataset
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

STEPS_PER_SECOND = 25  # sound latent steps a second
_LATENTS_SCRIPT = "ltx2_cache_latents.py"
_TEXT_SCRIPT = "ltx2_cache_text_encoder_outputs.py"
_LISTED = 10


@dataclass(frozen=True)
class CachedItem:
    """One trainable item. Paths of what it has not got are None.

    frames: pixel frames. size: width and height in the file name. latent_shape: (C, F, H, W). audio_steps: T of the
    sound latent, None without sound. bucket_key: items with equal keys may share a batch.
    """

    key: str
    stem: str
    latent_path: Path
    text_path: Path
    audio_path: Path | None
    dino_path: Path | None
    reference_path: Path | None
    reference_audio_path: Path | None
    frames: int
    size: Size
    latent_shape: tuple[int, ...]
    audio_steps: int | None
    bucket_key: tuple

    @property
    def has_audio(self) -> bool:
        return self.audio_path is not None


@dataclass
class Inventory:
    """The cache of one dataset: usable items sorted by file name, counts by kind of file, and the headers read.

    without_sound: keys of video items that have no sound latent (mode av). skipped: reason -> names.
    """

    dataset: Dataset
    items: list[CachedItem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    without_sound: list[str] = field(default_factory=list)
    headers: dict[Path, CacheHeader] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)


def take_inventory(dataset: Dataset, mode: str, *, references: bool = True, reference_audio: bool = True) -> Inventory:
    """Look through the cache of a dataset. Headers are read, tensor data is not.

    Args:
        mode: video, av or audio; in video mode sound latents are left alone.
        references, reference_audio: whether items need a reference where the dataset configures a folder of them.

    Raises:
        UserError: a text, sound or reference file is damaged.
    """
    found = Inventory(dataset)
    reference_folders = {
        "references": dataset.reference_cache_directory if references else None,
        "reference audio": dataset.reference_audio_cache_directory if reference_audio and mode != "video" else None,
    }
    folder = dataset.cache_directory
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    parsed = _parse_names(found, names)
    per_stem = Counter(name.stem for _, name in parsed)
    for latent, name in parsed:
        header = _own_header(found, latent)
        if header is None:
            continue
        found.counts["latents"] += 1
        companions = {
            "text": latent.with_name(cache_names.text_name(name.stem)),
            "dino": cache_names.dino_path(latent),
        }
        if mode != "video" and dataset.kind != "image":
            companions["audio"] = _audio_of(latent, name.stem, per_stem[name.stem])
        for column, place in reference_folders.items():
            if place is not None:
                file = latent if column == "references" else cache_names.audio_path(latent)
                companions[column] = place / file.name
        _add_item(found, latent, name, header, companions)
    stems = {name.stem for _, name in parsed}
    texts = (cache_names.parse_text_name(name) for name in names)
    lonely = sum(stem is not None and stem not in stems for stem in texts)
    if lonely:
        logger.info("%s: %d text caches have no latent", dataset.label, lonely)
    return found


def _parse_names(found: Inventory, names: Iterable[str]) -> list[tuple[Path, CacheName]]:
    """Latent files with their parsed names, sorted by file name."""
    folder, video = found.dataset.cache_directory, found.dataset.item_kind == "video"
    parsed = []
    for file_name in names:
        if not file_name.endswith(LATENT_SUFFIX) or file_name.startswith("."):
            continue
        name = cache_names.parse_latent_name(file_name, video=video)
        if name is None:
            found.skip("name", file_name)
        else:
            parsed.append((folder / file_name, name))
    if "name" in found.skipped:
        logger.warning(
            "%s: %d latent files are not named like items of this dataset and are skipped: %s",
            found.dataset.label,
            len(found.skipped["name"]),
            _some(found.skipped["name"]),
        )
    return parsed


def _own_header(found: Inventory, latent: Path) -> CacheHeader | None:
    """The header of a latent file, or None when the file is not ours to train on."""
    try:
        if latent.is_symlink() and latent.resolve().parent != latent.parent.resolve():
            raise UserError(f"{latent}: a link that leaves the cache directory")
        header = read_header(latent)
        if not header.is_ours or len(header.shape) != 4:
            raise UserError(f"{latent}: made for another model")
    except UserError as reason:
        logger.warning("%s; it is not trained on", reason)
        found.skip("foreign", latent.name)
        return None
    found.headers[latent] = header
    return header


def _audio_of(latent: Path, stem: str, latents_of_stem: int) -> Path:
    """Where the sound of an item is: beside the latent, or in the simplified layout where that is unambiguous."""
    usual = cache_names.audio_path(latent)
    simple = cache_names.simple_audio_path(latent, stem)
    return simple if latents_of_stem == 1 and not usual.is_file() and simple.is_file() else usual


def _add_item(
    found: Inventory, latent: Path, name: CacheName, header: CacheHeader, companions: Mapping[str, Path]
) -> None:
    """Count what exists of `companions` (by column of the count table) and take the item if nothing it needs misses."""
    present = {column: path for column, path in companions.items() if path.is_file()}
    found.counts.update(present.keys())
    needed = {"text": "no_text", "references": "no_reference", "reference audio": "no_reference"}
    if found.dataset.item_kind == "audio":
        needed["audio"] = "no_audio"
    missing = [reason for column, reason in needed.items() if column in companions and column not in present]
    if missing:
        found.skip(missing[0], name.key)
        return
    for column, path in present.items():
        if column != "dino" and path not in found.headers:
            found.headers[path] = read_header(path)
    audio, reference = present.get("audio"), present.get("references")
    if found.dataset.item_kind == "video" and audio is None:
        found.without_sound.append(name.key)
    audio_steps = found.headers[audio].shape[1] if audio else None
    reference_shape = found.headers[reference].shape if reference else None
    found.items.append(
        CachedItem(
            key=name.key,
            stem=name.stem,
            latent_path=latent,
            text_path=present["text"],
            audio_path=audio,
            dino_path=present.get("dino"),
            reference_path=reference,
            reference_audio_path=present.get("reference audio"),
            frames=name.frames or _frame_count(header),
            size=(name.width, name.height),
            latent_shape=header.shape,
            audio_steps=audio_steps,
            bucket_key=bucket_key(found.dataset, name, header.shape, audio_steps, reference_shape),
        )
    )
    found.counts["usable"] += 1


def _frame_count(header: CacheHeader) -> int:
    """Pixel frames by the metadata; 1 when it does not say."""
    count = header.metadata.get("frame_count", "")
    return int(count) if count.isascii() and count.isdigit() else 1


def bucket_key(
    dataset: Dataset,
    name: CacheName,
    latent_shape: Sequence[int],
    audio_steps: int | None,
    reference_shape: Sequence[int] | None,
) -> tuple:
    """What items of one batch have in common, from the cached tensors rather than from the configuration."""
    _, _, height, width = latent_shape
    if dataset.item_kind == "audio":
        key: tuple = (name.width, name.height)
    else:
        key = (width * STEP, height * STEP)
    if dataset.separate_audio_buckets:
        key += (int(audio_steps is not None),)
    if dataset.item_kind == "audio":
        key += (quantized_steps(audio_steps, dataset.audio_bucket_strategy, dataset.audio_bucket_interval),)
    elif dataset.item_kind == "video":
        key += (name.frames,)
    return key + tuple(reference_shape[1:] if reference_shape else ())


def quantized_steps(steps: int, strategy: str, interval: float) -> int:
    """Sound length of a bucket in latent steps, for `steps` cached ones and an interval in seconds."""
    quantum = max(round(interval * STEPS_PER_SECOND), 1)
    if strategy == "pad":
        return max((steps + quantum // 2) // quantum * quantum, quantum)
    return steps // quantum * quantum or steps


def check_inventories(
    inventories: Sequence[Inventory], mode: str, *, silence: bool = False, source: Path | None = None
) -> None:
    """Log the count table and what disagrees in it.

    Args:
        silence: items without sound are trained on silence, so that sound may be missing altogether.
        source: the dataset file, for the commands that messages name.

    Raises:
        UserError: a dataset has no usable item, or mode av or audio has no sound at all.
    """
    for line in count_table(inventories):
        logger.info("%s", line)
    for inventory in inventories:
        _warn_gaps(inventory)
        _warn_mixed(inventory)
    empty = [inventory for inventory in inventories if not inventory.items]
    if empty:
        places = "; ".join(f"{inventory.dataset.label} ({inventory.dataset.cache_directory})" for inventory in empty)
        raise UserError(
            f"no usable items in {places}: an item needs a latent and a text cache, "
            f"run {_LATENTS_SCRIPT} and {_TEXT_SCRIPT} with this dataset file and --ltx2_mode {mode}"
            f"{_lacking_references(empty)}"
        )
    trained = [inventory for inventory in inventories if not inventory.dataset.validation]
    if trained and mode != "video":
        _check_sound(trained, mode, silence, source)


def _lacking_references(inventories: Sequence[Inventory]) -> str:
    """What to add where items are left out for want of a cached reference."""
    names = [name for inventory in inventories for name in inventory.skipped.get("no_reference", [])]
    if not names:
        return ""
    return f"; {len(names)} items ({_some(names)}) lack the cached reference that this training needs"


def count_table(inventories: Sequence[Inventory]) -> list[str]:
    """One line per dataset and a total."""
    columns = ("latents", "audio", "text", "references", "reference audio", "dino", "usable")
    lines = []
    total: Counter = Counter()
    for inventory in inventories:
        total += inventory.counts
        lines.append(_row(inventory.dataset.label, inventory.counts, columns))
    return [*lines, _row("total", total, columns)]


def _row(label: str, counts: Counter, columns: Sequence[str]) -> str:
    return f"[{label}] " + " | ".join(f"{column} {counts[column]}" for column in columns)


def _warn_gaps(inventory: Inventory) -> None:
    label, counts = inventory.dataset.label, inventory.counts
    if counts["usable"] < counts["latents"]:
        reasons = "; ".join(
            f"{reason} {len(names)} ({_some(names)})" for reason, names in inventory.skipped.items() if reason != "name"
        )
        logger.warning("%s: %d of %d latents are usable: %s", label, counts["usable"], counts["latents"], reasons)


def _warn_mixed(inventory: Inventory) -> None:
    """Batches that mix items with and without sound are legal; the option keeps them apart."""
    dataset = inventory.dataset
    kinds: dict[tuple, set[bool]] = {}
    for item in inventory.items:
        kinds.setdefault(item.bucket_key, set()).add(item.has_audio)
    if dataset.batch_size > 1 and any(len(found) > 1 for found in kinds.values()):
        logger.warning(
            "%s: batches may mix items with and without sound; separate_audio_buckets = true keeps them apart",
            dataset.label,
        )


def _check_sound(inventories: Sequence[Inventory], mode: str, silence: bool, source: Path | None) -> None:
    """The line that says how much sound there is to learn from, and the error when there is none."""
    clips = [item for inventory in inventories if inventory.dataset.kind != "image" for item in inventory.items]
    heard = sum(item.has_audio for item in clips)
    silent = [key for inventory in inventories for key in inventory.without_sound]
    logger.info("sound: %d of %d clips (%d have no sound cache)", heard, len(clips), len(clips) - heard)
    if not heard:
        message = _no_sound(inventories, mode, source)
        if not silence:
            raise UserError(message)
        logger.warning("%s; --audio_silence_regularizer trains every item on silence", message)
    elif silent:
        logger.warning("%d clips have no sound cache and train the picture alone: %s", len(silent), _some(silent))


def _no_sound(inventories: Sequence[Inventory], mode: str, source: Path | None) -> str:
    """What is missing for sound, and the commands that make it."""
    texts = {item.text_path: found.headers[item.text_path] for found in inventories for item in found.items}
    joined = [header for header in texts.values() if "video_prompt_embeds" in header.shapes]
    mute = sum("audio_prompt_embeds" not in header.shapes for header in joined)
    scripts = [_LATENTS_SCRIPT]
    found = f"not one *{AUDIO_SUFFIX} in the caches"
    if mute:
        scripts.append(_TEXT_SCRIPT)
        found += f" and no audio embeddings in {mute} of {len(texts)} text caches, as --ltx2_mode video makes them"
    config = f" --dataset_config {source}" if source is not None and source.suffix == ".toml" else ""
    commands = " and ".join(f"python {script}{config} --ltx2_mode {mode}" for script in scripts)
    return (
        f"--ltx2_mode {mode}, but {found}; run {commands} (with the other flags as before), or, when no clip has "
        "sound, train with --ltx2_mode video"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
