"""Line charts as SVG text, with axes that a person can read."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 14, 34
_MOST_POINTS = 600
COLOURS = ("#2f6fd0", "#d1603d", "#2c9c69", "#8a5cc7", "#b58a12", "#c2417c")


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x. faint: drawn thin, behind the others. dots: few measurements."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False


def chart(title: str, series: Sequence[Series], *, unit: str = "", from_zero: bool = False) -> str:
    """An `<figure>` with the lines, "" when no series has a finite point.

    Args:
        unit: of the vertical axis.
        from_zero: the vertical axis starts at 0.
    """
    kept = [Series(line.name, thin_out(line.points), line.faint, line.dots) for line in series]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    scale_x = _Scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    scale_y = _Scale(min([0.0, *ys] if from_zero else ys), max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(scale_x, scale_y)]
    colours = {line.name: COLOURS[index % len(COLOURS)] for index, line in enumerate(kept)}
    for line in sorted(kept, key=lambda line: not line.faint):
        parts.append(_line(line, colours[line.name], scale_x, scale_y))
    legend = "".join(
        f'<span><i style="background:{colours[line.name]}"></i>{html.escape(line.name)}'
        f" <b>{format_number(line.points[-1][1])}</b></span>"
        for line in kept
    )
    heading = html.escape(title + (f" ({unit})" if unit else ""))
    return (
        f'<figure><figcaption>{heading}<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{heading}">{"".join(parts)}</svg></figure>'
    )


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Finite points, averaged in equal groups where there are more than a screen shows."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(finite) // _MOST_POINTS)
    if size <= 1:
        return finite
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def format_number(value: float) -> str:
    """Four significant digits, without needless zeros."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    """From values to pixels; equal ends are moved apart."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values inside the range, about `count` of them."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next((factor * power for factor in (1, 2, 5) if factor * power >= raw), 10 * power)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(scale_x: _Scale, scale_y: _Scale) -> list[str]:
    parts = []
    for value in scale_y.ticks(5):
        y = scale_y(value)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_number(value)}</text>')
    for value in scale_x.ticks(8):
        if value == int(value):
            x = scale_x(value)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{int(value)}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    return parts


def _line(line: Series, colour: str, scale_x: _Scale, scale_y: _Scale) -> str:
    places = [(scale_x(x), scale_y(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f'fill="none" stroke="{colour}" stroke-width="{1 if line.faint else 2}"'
    style += ' stroke-opacity="0.35"' if line.faint else ""
    drawn = f'<polyline points="{path}" {style}/>'
    if line.dots or len(places) == 1:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
    return drawn
