"""The page at the end of a run: curves, samples with players, the command and the versions, in one HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_tuner import files
from ltx2_tuner.training.charts import Series, chart, format_number
from ltx2_tuner.training.run_log import read_log

# Samples beyond this many bytes are linked, not embedded: a browser has to open the page.
EMBEDDED_BYTES = 100 * 2**20
_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".wav": "audio/wav"}

_STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
table { border-collapse: collapse } td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top } pre { background: var(--soft); padding: .7rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .6rem }
figcaption { font-weight: 600 } .legend { font-weight: 400; font-size: .85rem; display: flex; flex-wrap: wrap;
  gap: .2rem 1rem } .legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: .3rem } svg { width: 100%; height: auto } svg line { stroke: var(--line) }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; opacity: .75 }
.grid { overflow-x: auto } .grid td { min-width: 190px } .grid video, .grid img, .grid audio { width: 240px;
  display: block; margin-bottom: .3rem } .tiles { display: flex; gap: 1rem; flex-wrap: wrap }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem } .tiles b { display: block;
  font-size: 1.2rem }
"""


@dataclass(frozen=True)
class RunFacts:
    """What the page says about a run besides its numbers.

    command: the exact words, secrets replaced. versions: by package. settings: the effective configuration as TOML.
    prompts: of the samples, in the order of their numbers.
    """

    name: str
    command: Sequence[str]
    versions: Mapping[str, str]
    settings: str = ""
    prompts: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleFile:
    """A preview on disk: `when` is its step (`000050`) or epoch (`e000002`), `label` its slider multiplier or ""."""

    path: Path
    when: str
    index: int
    label: str
    time: str


def write_report(path: Path, log: Path, facts: RunFacts, samples: Sequence[SampleFile]) -> None:
    """Write the page.

    Args:
        log: the run's CSV file.
    """
    rows = read_log(log)
    sections = [
        f"<h1>{html.escape(facts.name)}</h1>",
        _tiles(rows),
        f'<h2>Curves</h2><div class="charts">{"".join(curves(rows))}</div>' if rows else "",
        _samples(samples, facts.prompts, path.parent),
        f"<h2>Command</h2><pre>{html.escape(_command(facts.command))}</pre>",
        _table("Versions", facts.versions),
        _table("Run", facts.facts),
        f"<h2>Settings</h2><details><summary>all flags</summary><pre>{html.escape(facts.settings)}</pre></details>"
        if facts.settings
        else "",
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(facts.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )
    files.write_text(path, page)


def curves(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The charts that the logged numbers allow."""

    def series(name: str, label: str, **kind: bool) -> Series:
        return Series(label, [(row["step"], row[name]) for row in rows if name in row], **kind)

    rates = sorted({name for row in rows for name in row if name.startswith("lr/")})
    drawn = [
        chart(
            "Loss",
            [
                series("loss/current", "each step", faint=True),
                series("loss/average", "average"),
                series("val_loss", "validation", dots=True),
            ],
        ),
        chart(
            "Loss of picture and sound",
            [
                series("loss/video", "video"),
                series("loss/audio", "audio"),
                series("val_loss/video", "validation video", dots=True),
                series("val_loss/audio", "validation audio", dots=True),
            ],
        ),
        chart("Learning rate", [series(name, name.removeprefix("lr/")) for name in rates], from_zero=True),
        chart("Time per step", [series("perf/step_seconds", "seconds")], unit="s", from_zero=True),
        chart("Peak device memory", [series("perf/peak_memory_gib", "GiB")], unit="GiB", from_zero=True),
        chart("Gradient norm", [series("grad_norm/total", "before clipping")], from_zero=True),
    ]
    return [figure for figure in drawn if figure]


def find_samples(folder: Path, name: str) -> list[SampleFile]:
    """The previews of a run by their file names, oldest first."""
    pattern = re.compile(
        re.escape(name) + r"(?P<label>_mult[+-]\d+\.\d)?_(?P<when>e?\d{6,})_(?P<index>\d{2,})_(?P<time>\d{14})_-?\d+"
        r"(_av)?\.(mp4|png|wav)"
    )
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            label = (match["label"] or "").removeprefix("_mult")
            found.append(SampleFile(path, match["when"], int(match["index"]), label, match["time"]))
    return sorted(found, key=lambda sample: (sample.time, sample.index, sample.path.name))


def _tiles(rows: Sequence[Mapping[str, object]]) -> str:
    """The few numbers that are looked at first."""
    if not rows:
        return "<p>No step was finished.</p>"
    seconds = sorted(row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row)
    last = {name: value for row in rows for name, value in row.items()}
    tiles = {"steps": str(rows[-1]["step"])}
    for label, name in (("average loss", "loss/average"), ("validation loss", "val_loss")):
        if name in last:
            tiles[label] = format_number(last[name])
    if seconds:
        tiles["s/step (median)"] = format_number(seconds[len(seconds) // 2])
    if "perf/peak_memory_gib" in last:
        tiles["peak memory, GiB"] = format_number(max(row.get("perf/peak_memory_gib", 0.0) for row in rows))
    return '<div class="tiles">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in tiles.items()) + "</div>"


def _samples(samples: Sequence[SampleFile], prompts: Sequence[str], root: Path) -> str:
    """A grid: a row for each time samples were made, a column for each prompt (and multiplier)."""
    if not samples:
        return ""
    embedded = _embedded(samples)
    columns = sorted({(sample.index, float(sample.label or 0), sample.label) for sample in samples})
    cells: dict[tuple, list[str]] = {}
    for sample in samples:
        if sample.path.suffix == ".mp4" and any(other.path.name == f"{sample.path.stem}_av.mp4" for other in samples):
            continue  # the same picture with its sound
        key = sample.when, sample.index, sample.label
        cells.setdefault(key, []).append(_player(sample.path, sample.path in embedded, root))
    heads = []
    for index, _, label in columns:
        prompt = prompts[index] if index < len(prompts) else f"prompt {index}"
        heads.append(f"<th>{html.escape(prompt)}{f'<br>multiplier {label}' if label else ''}</th>")
    lines = []
    for when in dict.fromkeys(sample.when for sample in samples):
        title = f"epoch {int(when[1:])}" if when.startswith("e") else f"step {int(when)}"
        row = "".join(f"<td>{''.join(cells.get((when, index, label), []))}</td>" for index, _, label in columns)
        lines.append(f"<tr><th>{title}</th>{row}</tr>")
    return f'<h2>Samples</h2><div class="grid"><table><tr><th></th>{"".join(heads)}</tr>{"".join(lines)}</table></div>'


def _embedded(samples: Sequence[SampleFile]) -> set[Path]:
    """The newest files that fit into the page."""
    chosen, total = set(), 0
    for sample in reversed(samples):
        total += sample.path.stat().st_size
        if total > EMBEDDED_BYTES:
            break
        chosen.add(sample.path)
    return chosen


def _player(path: Path, embed: bool, root: Path) -> str:
    if embed:
        source = f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    else:
        source = html.escape(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_uri())
    if path.suffix == ".png":
        return f'<img loading="lazy" src="{source}" alt="">'
    if path.suffix == ".wav":
        return f'<audio controls preload="none" src="{source}"></audio>'
    return f'<video controls loop preload="metadata" src="{source}"></video>'


def _command(words: Sequence[str]) -> str:
    """The words as a shell would take them."""
    return " ".join(f'"{word}"' if not word or re.search(r"[\s\"'*?$&;|<>()]", word) else word for word in words)


def _table(title: str, entries: Mapping[str, str]) -> str:
    if not entries:
        return ""
    lines = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in entries.items())
    return f"<h2>{title}</h2><table>{lines}</table>"
