"""What both caching scripts do around encoding: journal, staleness, disk estimate, orphans, counts and the report.

A script lays its items out in batches over the whole member list, decides which files can stay (`Journal.done`,
`data.metadata.stale_reason`), encodes every batch that misses a file, tells the journal and a `Tally` per dataset,
removes orphans, prints `summary_lines`, writes the reports and returns `exit_status`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile
from ltx2_tuner.data.cache_files import ARCHITECTURE
from ltx2_tuner.data.cache_names import REPORT_NAME
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_json, write_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp", re.DOTALL)
_LISTED_FAILURES = 20
_LISTED_NAMES = 10


class Journal:
    """Which files an interrupted run had finished, so that the same command goes on where it stopped.

    The file holds a hash of the settings and one name a line. Names are added after the file they stand for was
    renamed into place, so a kill in between costs one encoding and loses nothing.

    Args:
        directory: cache directory of the first dataset.
        script: `latents`, `text` or `dino`; each has its own journal.
        settings: JSON values that decide what is written; other settings start afresh.
    """

    def __init__(self, directory: Path, script: str, settings: Mapping) -> None:
        self.path = Path(directory) / f"ltx2_cache_{script}.journal"
        text = json.dumps(settings, sort_keys=True, default=str)
        head = json.dumps({"settings": hashlib.sha256(text.encode()).hexdigest()})
        self.done: set[str] = self._read(head)
        # Written anew: a torn last line of the interrupted run must not swallow the next name.
        lines = (head, *map(json.dumps, sorted(self.done)))
        try:
            write_text(self.path, "".join(f"{line}\n" for line in lines))
            self._file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); check the cache directory") from error

    def _read(self, head: str) -> set[str]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return set()
        if lines[0] != head:
            return set()
        names = set()
        for line in lines[1:]:
            try:
                name = json.loads(line)
            except ValueError:
                continue
            if isinstance(name, str):
                names.add(name)
        return names

    def add(self, name: str) -> None:
        """Note that the file (or item) `name` is complete."""
        self.done.add(name)
        try:
            self._file.write(json.dumps(name) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space and go on") from error

    def finish(self) -> None:
        """Remove the journal: the run is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and leave it for the next run."""
        self._file.close()


def read_metadata(path: Path) -> dict[str, str] | None:
    """Metadata of a cache file, or None when there is no such file or its header is unreadable."""
    try:
        with SafetensorsFile(path) as file:
            return file.metadata
    except UserError:
        return None


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive runs of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def check_disk_space(expected: Mapping[Path, int], ignore: bool = False) -> int:
    """Log the expected size of the files to write, and refuse when it exceeds the free space.

    Args:
        expected: bytes per path; a file that is replaced counts with what it adds.
        ignore: only warn (--ignore_disk_space).

    Returns:
        Bytes of all files together.
    """
    needs: Counter[int] = Counter()
    places: dict[int, Path] = {}
    for path, size in expected.items():
        place = _existing(path.parent)
        device = place.stat().st_dev
        places.setdefault(device, place)
        needs[device] += size - (path.stat().st_size if path.is_file() else 0)
    total = sum(expected.values())
    for device, place in places.items():
        free = shutil.disk_usage(place).free
        need = max(needs[device], 0)
        logger.info("expected cache size %s; %s free on the file system of %s", size_text(need), size_text(free), place)
        if need > free:
            message = (
                f"{place}: the cache needs about {size_text(need)}, but only {size_text(free)} are free; "
                "free some space, use another cache_directory or give --ignore_disk_space"
            )
            if not ignore:
                raise UserError(message)
            logger.warning("%s", message)
    return total


def _existing(directory: Path) -> Path:
    directory = directory.absolute()
    while not directory.is_dir() and directory != directory.parent:
        directory = directory.parent
    return directory


def size_text(count: int) -> str:
    """`1.5 GB` (decimal units)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@dataclass
class Tally:
    """Counts of one dataset, for the summary and the report.

    Attributes:
        label: `Dataset 0` or `Validation 0`.
        directory: its cache directory.
        sources: source files found.
        items: items the configuration makes of them.
        counts: `encoded`, `skipped (existing)`, `failed`, then any other reason for leaving a source out.
        tracks: the same for parts of an item: `Audio`, `Reference`, ...
        failures: item, reason.
        names: which items a reason such as `no caption` counts.
    """

    label: str
    directory: Path
    sources: int = 0
    items: int = 0
    counts: Counter = field(default_factory=Counter)
    tracks: dict[str, Counter] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, item: str | None = None, track: str | None = None) -> None:
        """Count an item (of a track) under `reason`; with `item`, list its name too."""
        self._counter(track)[reason] += 1
        if item is not None:
            self.names.setdefault(reason, []).append(item)

    def fail(self, item: str, reason: str, track: str | None = None) -> None:
        """Count a failed item (of a track) and log why."""
        self._counter(track)["failed"] += 1
        self.failures.append((item, reason))
        logger.error("%s: %s failed: %s", self.label, item, reason)

    def _counter(self, track: str | None) -> Counter:
        return self.counts if track is None else self.tracks.setdefault(track, Counter())

    @property
    def usable(self) -> int:
        """Items that have their files."""
        return self.counts["encoded"] + self.counts["skipped (existing)"]

    def lines(self) -> list[str]:
        """The summary line and one line per track."""
        always = {name: self.counts[name] for name in ("encoded", "skipped (existing)", "failed")}
        others = {name: count for name, count in self.counts.items() if name not in always and count}
        parts = {"sources": self.sources, "items": self.items, **always, **others}
        result = [f"[{self.label}] " + " | ".join(f"{name} {count}" for name, count in parts.items())]
        for track, counts in self.tracks.items():
            shown = (
                dict.fromkeys(("encoded", "failed"), 0) | counts | {"skipped (existing)": counts["skipped (existing)"]}
            )
            result.append(f"{track}: " + ", ".join(f"{name} {count}" for name, count in shown.items()))
        return result

    def report(self) -> dict[str, object]:
        """JSON value of everything counted."""
        return {
            "label": self.label,
            "sources": self.sources,
            "items": self.items,
            "counts": dict(self.counts),
            "tracks": {track: dict(counts) for track, counts in self.tracks.items()},
            "failures": [{"item": item, "reason": reason} for item, reason in self.failures],
            "names": self.names,
        }


def summary_lines(tallies: Sequence[Tally]) -> list[str]:
    """The last lines of a caching script: per dataset, total, what was left out, failures, and the failed count."""
    total = Tally("Total", Path())
    lines = []
    for tally in tallies:
        lines += tally.lines()
        total.sources += tally.sources
        total.items += tally.items
        total.counts += tally.counts
        for track, counts in tally.tracks.items():
            total.tracks[track] = total.tracks.get(track, Counter()) + counts
        for reason, names in tally.names.items():
            listed = ", ".join(names[:_LISTED_NAMES]) + (", ..." if len(names) > _LISTED_NAMES else "")
            lines.append(f"[{tally.label}] {reason}: {listed}")
    lines += total.lines()
    for tally in tallies:
        if tally.counts["no caption"] and not tally.items:
            lines.append(
                f"[{tally.label}] none of the {tally.sources} sources has a caption file; write one beside each of "
                "them, and name its ending with caption_extension"
            )
    failures = [(tally, *failure) for tally in tallies for failure in tally.failures]
    lines += [f"failed: [{tally.label}] {item}: {reason}" for tally, item, reason in failures[:_LISTED_FAILURES]]
    if failures:
        reports = ", ".join(dict.fromkeys(str(tally.directory / REPORT_NAME) for tally, _, _ in failures))
        lines.append(f"failed {len(failures)} (all of them in {reports})")
    return lines


def write_reports(tallies: Sequence[Tally], script: str) -> None:
    """Write `ltx2_cache_report.json` of every cache directory; the parts that other scripts wrote stay."""
    for tally in tallies:
        path = tally.directory / REPORT_NAME
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            report = {}
        report = report if isinstance(report, dict) else {}
        write_json(path, dict(sorted({**report, script: tally.report()}.items())))


def exit_status(tallies: Sequence[Tally], *, strict: bool = False, lost_track: str | None = None) -> int:
    """0 when every dataset has a usable item and nothing that counts was lost, else 1.

    Args:
        strict: any failure counts.
        lost_track: the track whose failures always count (`Audio` in modes av and audio).
    """
    if any(tally.usable == 0 for tally in tallies):
        return 1
    if lost_track and any(tally.tracks.get(lost_track, Counter())["failed"] for tally in tallies):
        return 1
    return int(strict and any(tally.failures for tally in tallies))


def find_orphans(
    directory: Path, suffix: str, members: Iterable[Path], belongs: Callable[[str], bool] | None = None
) -> list[Path]:
    """Cache files of our own making that the configuration no longer produces, sorted by name.

    Args:
        directory: a cache directory.
        suffix: end of the names that the calling script writes, such as `_ltx2_te.safetensors`.
        members: paths that the configuration produces.
        belongs: true for a file name whose source is in the dataset; such a file is no orphan (give it after failures).

    A file whose header is unreadable or names another architecture is foreign: logged, never returned.
    """
    known = {path.name for path in members}
    orphans = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.name.startswith(".") or not path.name.endswith(suffix) or path.name in known or not path.is_file():
            continue
        metadata = read_metadata(path)
        if metadata is None or metadata.get("architecture") != ARCHITECTURE:
            logger.warning("%s is not a cache file of ours; it is left alone and never trained on", path)
        elif belongs is None or not belongs(path.name):
            orphans.append(path)
    return orphans


def remove_orphans(orphans: Sequence[Path], keep: bool = False) -> None:
    """Delete orphans, or with `keep` only name them (they then take part in training)."""
    if not orphans:
        return
    names = ", ".join(path.name for path in orphans[:_LISTED_NAMES]) + (", ..." if len(orphans) > _LISTED_NAMES else "")
    if keep:
        logger.info("kept %d cache files without a source (--keep_cache): %s", len(orphans), names)
        return
    for path in orphans:
        path.unlink(missing_ok=True)
    logger.info("removed %d cache files without a source: %s", len(orphans), names)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files (`.<name>.<pid>.tmp`) of processes that no longer run."""
    for path in directory.glob(".*.tmp") if directory.is_dir() else []:
        match = _TEMPORARY.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)
