"""The numbers of a run as a CSV file: one row per optimizer step, a column per number."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from ltx2_tuner import files

_FIXED = ("step", "time")


class RunLog:
    """Adds a row per step. A resumed run goes on in the file, from the step it resumed at.

    Numbers of one step that are logged apart (validation, the end of an epoch) are one row, which is on disk from the
    first of them on. A name that appears for the first time becomes a new last column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = list(_FIXED)
        self._row: dict[str, object] = {}
        self._row_start = 0  # bytes before the last row
        self._started = False

    @property
    def has_rows(self) -> bool:
        """Whether anything was logged."""
        return self._started

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add numbers to the row of a step."""
        if not self._started:
            self._start(step)
        if self._row.get("step") != step:
            self._row = {"step": step, "time": datetime.datetime.now().isoformat(timespec="seconds")}
            self._row_start = self.path.stat().st_size
        self._row.update(metrics)
        new = [name for name in metrics if name not in self._columns]
        if new:
            earlier = [row for row in read_log(self.path) if row["step"] < step]
            self._columns += new
            self._rewrite(earlier)
        with open(self.path, "r+b") as file:
            file.seek(self._row_start)
            file.write(self._lines([self._row]).encode())
            file.truncate()

    def _start(self, step: int) -> None:
        """Keep what an earlier part of this run wrote; a first step starts afresh."""
        self._started = True
        rows = [row for row in read_log(self.path) if row["step"] <= step] if step > 1 else []
        for row in rows:
            self._columns += [name for name in row if name not in self._columns]
        self._row = rows.pop() if rows and rows[-1]["step"] == step else {}
        self._rewrite(rows)

    def _rewrite(self, rows: Iterable[Mapping[str, object]]) -> None:
        text = ",".join(self._columns) + "\n" + self._lines(rows)
        files.write_text(self.path, text)
        self._row_start = len(text.encode())

    def _lines(self, rows: Iterable[Mapping[str, object]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        for row in rows:
            writer.writerow({name: _written(value) for name, value in row.items()})
        return text.getvalue()


def _written(value: object) -> object:
    return f"{value:.8g}" if isinstance(value, float) else value


def read_log(path: Path) -> list[dict[str, object]]:
    """The rows of a log, absent numbers left out; lines that a killed run left half-written are skipped."""
    if not path.is_file():
        return []
    rows: list[dict[str, object]] = []
    with open(path, encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            row = _read_row(record)
            if row is not None:
                rows.append(row)
    return rows


def _read_row(record: Mapping[str, str | None]) -> dict[str, object] | None:
    if None in record or None in record.values():
        return None
    try:
        row: dict[str, object] = {"step": int(record["step"]), "time": record["time"]}
        return row | {name: float(text) for name, text in record.items() if text and name not in _FIXED}
    except (KeyError, ValueError):
        return None
