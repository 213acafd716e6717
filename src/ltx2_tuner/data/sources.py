"""Finding the source files of a dataset, their captions and what goes with them. Nothing is decoded here."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ltx2_tuner.data.config import Dataset
from ltx2_tuner.data.jsonl import read_records
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

_JPEG_XL = (".jxl",) if any(importlib.util.find_spec(name) for name in ("jxlpy", "pillow_jxl")) else ()
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", *_JPEG_XL)
VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
# In order of preference; what follows the common ones is all that PyAV reads as well.
_COMMON_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".aac", ".opus", ".wma")
_OTHER_AUDIO = (".aif", ".aiff", ".aifc", ".ac3", ".eac3", ".amr", ".ape", ".au", ".caf", ".dts")
_OTHER_AUDIO += (".m4b", ".mka", ".mp2", ".mpc", ".oga", ".spx", ".tta", ".w64", ".weba", ".wv")
AUDIO_EXTENSIONS = (*_COMMON_AUDIO, *_OTHER_AUDIO)
_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS, "audio": AUDIO_EXTENSIONS}

# Per kind of dataset: what else it takes, and what it is where a file of its own kind has the same name.
_SECONDARY = {
    "video": (IMAGE_EXTENSIONS, "a picture that accompanies the clip"),
    "audio": (VIDEO_EXTENSIONS, "a clip beside the sound file"),
}

# File systems take 255 bytes; cache names append up to 50, temporary names another 15.
_LONGEST_STEM = 190


@dataclass(frozen=True)
class Source:
    """One source file with its caption.

    form: how it is decoded: image, video, frames (a folder of pictures) or audio. stem: what cache names start with.
    reference, reference_audio, audio: files that a JSONL record names for it.
    """

    path: Path
    stem: str
    form: str
    caption: str
    reference: Path | None = None
    reference_audio: Path | None = None
    audio: Path | None = None


@dataclass(frozen=True)
class Failure:
    """A source (or item) that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SourceList:
    """The sources of a dataset, sorted by file name (JSONL: in file order).

    no_caption: files left out because they have no caption file. empty_caption: names of sources whose caption is
    empty (kept). failures: sources that cannot be used.
    """

    sources: tuple[Source, ...]
    no_caption: tuple[Path, ...] = ()
    empty_caption: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def count(self) -> int:
        """Files found, usable or not."""
        return len(self.sources) + len(self.no_caption) + len(self.failures)


def list_sources(dataset: Dataset) -> SourceList:
    """The sources of a dataset with their captions.

    Raises:
        UserError: nothing found, a bad JSONL line, or two files with the same stem.
    """
    if dataset.source_jsonl is not None:
        found = _from_jsonl(dataset)
    elif dataset.source_directory is not None:
        found = _from_directory(dataset)
    else:
        raise UserError(f"{dataset.label}: came from a manifest and has no source files; use --dataset_config")
    if not found.count:
        place = dataset.source_directory or dataset.source_jsonl
        wanted = " ".join(_extensions(dataset.kind))
        raise UserError(f"{dataset.label}: found 0 {dataset.kind} files in {place}; looked for {wanted}")
    _check_stems(dataset.label, found.sources)
    return found


def warn_shared_sources(datasets: Iterable[tuple[Dataset, SourceList]]) -> None:
    """Warn about files that are both trained on and validated with: their validation loss says little."""
    owners: dict[Path, Dataset] = {}
    pairs = list(datasets)
    for dataset, found in pairs:
        if not dataset.validation:
            owners |= {source.path.resolve(): dataset for source in found.sources}
    for dataset, found in pairs:
        shared = [source.path.name for source in found.sources if source.path.resolve() in owners]
        if dataset.validation and shared:
            logger.warning(
                "%s: %d files are training files too, so their loss says little: %s",
                dataset.label,
                len(shared),
                ", ".join(shared[:10]),
            )


def directory_files(directory: Path, extensions: Iterable[str]) -> list[Path]:
    """Visible regular files directly in `directory` with one of the extensions (any case), sorted by name."""
    accepted = set(extensions)
    try:
        entries = sorted(directory.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise UserError(f"{directory}: cannot be listed ({error.strerror or error}); check the folder") from error
    return [
        path for path in entries if path.suffix.lower() in accepted and not path.name.startswith(".") and path.is_file()
    ]


def source_form(path: Path) -> str | None:
    """How a file or folder is decoded: image, video, audio or frames; None for other files."""
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises on names that are too long)
        return "frames"
    return next((kind for kind, known in _EXTENSIONS.items() if path.suffix.lower() in known), None)


def _extensions(kind: str) -> tuple[str, ...]:
    """What a dataset of this kind takes: video datasets pictures too, audio datasets the sound of clips."""
    return (*_EXTENSIONS[kind], *_SECONDARY.get(kind, ((),))[0])


def _from_directory(dataset: Dataset) -> SourceList:
    files = directory_files(dataset.source_directory, _extensions(dataset.kind))
    if dataset.kind in _SECONDARY:
        files = _without_companions(files, dataset.kind)
    sources, no_caption, empty, failures = [], [], [], []
    for path in files:
        try:
            caption = _read_caption(path.with_suffix(dataset.caption_extension))
            stem = safe_stem(path)
        except ValueError as reason:
            failures.append(Failure(path.name, str(reason)))
            continue
        if caption is None:
            no_caption.append(path)
            continue
        if not caption:
            empty.append(path.name)
        sources.append(Source(path, stem, source_form(path), caption))
    return SourceList(tuple(sources), tuple(no_caption), tuple(empty), tuple(failures))


def _without_companions(files: list[Path], kind: str) -> list[Path]:
    """Drop pictures that only accompany a clip (`a.png` or `a.mp4.png` beside `a.mp4`), and clips beside their sound.

    Args:
        kind: video, or audio, where a clip is left out beside a sound file of its name.
    """
    main, other, what = _EXTENSIONS[kind], *_SECONDARY[kind]
    primary = [path for path in files if path.suffix.lower() in main]
    names = {path.stem for path in primary} | {path.name for path in primary}
    kept = []
    for path in files:
        if path.suffix.lower() in other and path.stem in names:
            logger.info("%s is ignored: %s of the same name", path, what)
        else:
            kept.append(path)
    return kept


def _read_caption(path: Path) -> str | None:
    """The caption in a file, or None when there is no such file; ValueError when it is not UTF-8."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"the caption file {path.name} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"the caption file {path.name} cannot be read ({error.strerror or error})") from None


def safe_stem(path: Path) -> str:
    """The stem of a source, which cache names start with; ValueError when no file can be named after it."""
    stem = path.name if path.is_dir() else path.stem
    if stem in ("", ".", "..") or "\\" in stem or any(ord(character) < 32 for character in stem):
        raise ValueError(f"no cache file can be named after {path.name!r}; rename the source")
    if len(stem.encode("utf-8", "surrogateescape")) > _LONGEST_STEM:
        raise ValueError(f"the name is longer than {_LONGEST_STEM} bytes, too long for cache files; rename the source")
    return stem


def _from_jsonl(dataset: Dataset) -> SourceList:
    sources, empty, failures = [], [], []
    for record in read_records(dataset.source_jsonl, dataset.kind, dataset.caption_field):
        path = record.source
        form = source_form(path)
        try:
            if not os.path.exists(path):  # noqa: PTH110
                raise ValueError("no such file")
            if form == "frames" and dataset.kind == "video":
                if not directory_files(path, IMAGE_EXTENSIONS):
                    raise ValueError("a folder without pictures")
            elif form == "frames" or path.suffix.lower() not in _extensions(dataset.kind):
                raise ValueError(f"not one of {' '.join(_extensions(dataset.kind))}")
            stem = safe_stem(path)
        except (ValueError, UserError) as reason:
            failures.append(Failure(str(path), f"{reason} ({dataset.source_jsonl.name}:{record.line})"))
            continue
        if not record.caption:
            empty.append(path.name)
        sources.append(Source(path, stem, form, record.caption, record.reference, record.reference_audio, record.audio))
    return SourceList(tuple(sources), (), tuple(empty), tuple(failures))


def _check_stems(label: str, sources: Iterable[Source]) -> None:
    by_stem: dict[str, list[Path]] = {}
    for source in sources:
        by_stem.setdefault(source.stem, []).append(source.path)
    clashes = [" and ".join(map(str, paths)) for paths in by_stem.values() if len(paths) > 1]
    if clashes:
        more = f" and {len(clashes) - 10} more" if len(clashes) > 10 else ""
        raise UserError(
            f"{label}: files with the same stem would share cache files; rename one of "
            + "; ".join(clashes[:10])
            + more
        )
