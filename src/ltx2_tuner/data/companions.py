"""Pairing sources with files of the same stem: references, reference sound, external sound tracks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner.data.config import Dataset
from ltx2_tuner.data.sources import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Source,
    directory_files,
    source_form,
)
from ltx2_tuner.errors import nearest

logger = logging.getLogger(__name__)


class CompanionIndex:
    """The files of one folder by stem.

    Args:
        directory: where to look; a missing folder has no files.
        extensions: accepted ones, in order of preference.
        folders: also take folders of frames, after the files.
    """

    def __init__(self, directory: Path, extensions: Sequence[str], *, folders: bool = False) -> None:
        self.directory = directory
        rank = {extension: place for place, extension in enumerate(dict.fromkeys(extensions))}
        files = directory_files(directory, rank) if directory.is_dir() else []
        files.sort(key=lambda path: rank[path.suffix.lower()])
        self._exact: dict[str, list[Path]] = {}
        for path in files:
            self._exact.setdefault(path.stem, []).append(path)
        if folders and directory.is_dir():
            for path in sorted(directory.iterdir()):
                if path.is_dir() and not path.name.startswith(".") and directory_files(path, IMAGE_EXTENSIONS):
                    self._exact.setdefault(path.name, []).append(path)
        self._folded: dict[str, list[Path]] = {}
        for stem, paths in self._exact.items():
            self._folded.setdefault(stem.casefold(), []).extend(paths)

    def find(self, stem: str) -> Path | None:
        """The file for a stem: exact match first, then any case. Several exact matches are warned about."""
        exact = self._exact.get(stem, [])
        if len(exact) > 1:
            names = ", ".join(path.name for path in exact)
            logger.warning("%s: several files for '%s' (%s); %s is used", self.directory, stem, names, exact[0].name)
        matches = exact or self._folded.get(stem.casefold(), [])
        return matches[0] if matches else None

    def near(self, stem: str) -> Path | None:
        """The file whose stem looks most like one that is not there."""
        match = nearest(stem, self._exact)
        return self._exact[match][0] if match else None


class SoundFinder:
    """Where the sound of a video item comes from.

    Args:
        external: False takes the clip's own track, True a sound file of the same stem (--ltx2_audio_source).
        directory: folder of the sound files (default: that of each clip).
        extension: preferred extension.
    """

    def __init__(self, external: bool = False, directory: Path | None = None, extension: str = ".wav") -> None:
        self.external = external
        self.directory = directory
        self.extensions = tuple(dict.fromkeys((extension.lower(), *AUDIO_EXTENSIONS)))
        self._indexes: dict[Path, CompanionIndex] = {}

    def find(self, source: Source) -> Path | None:
        """The file that holds the sound of a source, or None. A clip may still turn out to have no sound track."""
        if source.audio is not None:
            return source.audio
        if source.form == "audio":
            return source.path
        if not self.external:
            return source.path if source.form == "video" else None
        directory = self.directory or source.path.parent
        if directory not in self._indexes:
            self._indexes[directory] = CompanionIndex(directory, self.extensions)
        return self._indexes[directory].find(source.stem)


class References:
    """What a dataset's reference folders and JSONL records say about each source.

    `pictures` and `sounds` tell whether references of that kind are to be cached at all.
    """

    def __init__(self, dataset: Dataset, sources: Sequence[Source], audio_extension: str = ".wav") -> None:
        self._pictures = self._sounds = None
        if dataset.reference_directory is not None:
            self._pictures = CompanionIndex(
                dataset.reference_directory, (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS), folders=True
            )
        if dataset.reference_audio_directory is not None:  # clips are accepted as containers of sound
            self._sounds = CompanionIndex(
                dataset.reference_audio_directory, (audio_extension.lower(), *AUDIO_EXTENSIONS, *VIDEO_EXTENSIONS)
            )
        named = any(source.reference for source in sources)
        self.pictures = dataset.reference_cache_directory is not None and (self._pictures is not None or named)
        named = any(source.reference_audio for source in sources)
        self.sounds = dataset.reference_audio_cache_directory is not None and (self._sounds is not None or named)

    def picture(self, source: Source) -> Path | None:
        """The reference picture, clip or folder of frames of a source."""
        return _explicit_or_found(source.reference, self._pictures, source) if self.pictures else None

    def near_picture(self, source: Source) -> Path | None:
        """A file that may have been meant as the reference of a source without one."""
        return self._pictures.near(source.stem) if self._pictures is not None else None

    def near_sound(self, source: Source) -> Path | None:
        """A file that may have been meant as the reference sound of a source without one."""
        return self._sounds.near(source.stem) if self._sounds is not None else None

    def sound(self, source: Source) -> Path | None:
        """The file with the reference sound of a source."""
        return _explicit_or_found(source.reference_audio, self._sounds, source) if self.sounds else None


def _explicit_or_found(explicit: Path | None, index: CompanionIndex | None, source: Source) -> Path | None:
    if explicit is not None:
        return explicit if source_form(explicit) and os.path.exists(explicit) else None  # noqa: PTH110
    return index.find(source.stem) if index is not None else None
