"""Charts as SVG for a page that is read on paper, on a phone and in the dark.

Text and lines take the page's colours: series are the classes `s0` to `s7`, everything else `currentColor`. Series
differ by dash and marker, or by pattern, as well as by colour. Sizes suit a column of 440 units, so that text stays
readable at a phone's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 44
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 1 2")
SERIES = len(DASHES)


@dataclass(frozen=True)
class Series:
    """A line, or single marks.

    Attributes:
        points: (x, y).
        line: joined by a line.
        marks: each point has a marker.
        faint: a line to compare with, such as the ideal.
    """

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    marks: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """A labelled axis.

    Attributes:
        label: with the unit.
        zero: starts at 0.
        logarithmic: base 2, for numbers of ranks.
    """

    label: str
    zero: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture with what is said around it.

    Attributes:
        caption: what to read from it.
        legend: class number and name of each series, and whether it is a faint line.
    """

    title: str
    caption: str
    svg: str
    legend: list[tuple[int, str, str]]


class _Scale:
    """Values to places on the picture."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        low, high = min(values), max(values)
        if axis.logarithmic:
            self.ticks = sorted(set(values))
            self.low, self.high = math.log2(low) - 0.25, math.log2(high) + 0.25
            return
        low = 0.0 if axis.zero else low
        if high <= low:
            high = low + (abs(low) or 1.0)
        step = _nice((high - low) / 4)
        self.low, self.high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
        self.ticks = [self.low + i * step for i in range(round((self.high - self.low) / step) + 1)]

    def at(self, value: float) -> float:
        place = math.log2(value) if self.axis.logarithmic else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)


def _nice(step: float) -> float:
    """The next larger of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def number(value: float) -> str:
    """A short number: 1,500, 12k, 3.4M, 0.05."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size * 0.9995:  # what rounds up to the next unit is written in it
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line_chart(title: str, caption: str, x: Axis, y: Axis, series: Sequence[Series]) -> Chart:
    """Lines over a number. Points that are not finite are left out.

    Raises:
        ValueError: no series has a point.
    """
    kept = [(i % SERIES, s, [p for p in s.points if all(map(math.isfinite, p))]) for i, s in enumerate(series)]
    kept = [(i, s, points) for i, s, points in kept if points]
    if not kept:
        raise ValueError("nothing to draw")
    points = [p for _, _, found in kept for p in found]
    across = _Scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [_grid(up), _x_ticks(across), _labels(x.label, y.label)]
    parts += [_drawn(index, s, [(across.at(a), up.at(b)) for a, b in found]) for index, s, found in kept]
    legend = [(index, s.name, "faint" if s.faint else "line" if s.line else "mark") for index, s, _ in kept]
    return Chart(title, caption, _svg(title, caption, "".join(parts)), legend)


def _drawn(index: int, series: Series, places: Sequence[tuple[float, float]]) -> str:
    found = ""
    if series.line and len(places) > 1:
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        kind = "faint" if series.faint else f"s{index}"
        found += f'<polyline class="{kind}" stroke-dasharray="{DASHES[index]}" points="{way}"/>'
    if series.marks and not series.faint:
        found += "".join(marker(index, x, y) for x, y in places)
    return f"<g><title>{escape(series.name)}</title>{found}</g>"


def marker(index: int, x: float, y: float) -> str:
    """The marker of a series: four shapes, filled, then hollow."""
    r = 4.2
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r:.1f}l{r} {2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    )
    hollow = " hollow" if index >= len(shapes) else ""
    return f'<path class="m{index}{hollow}" d="{shapes[index % len(shapes)]}"/>'


def stacked_bars(
    title: str, caption: str, label: str, rows: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]]
) -> Chart:
    """Lying bars, one a row, each of several parts.

    Args:
        label: of the axis, with the unit.
        parts: name of a part and its size in each row.
    """
    totals = [sum(sizes[i] for _, sizes in parts) for i in range(len(rows))]
    band, height = 44, TOP + BOTTOM + 44 * len(rows)
    across = _Scale(Axis(label, zero=True), [*totals, 0.0], 8, WIDTH - RIGHT - 6)
    drawn = [_x_ticks(across, height, line=True), _labels(label, "", height)]
    for i, name in enumerate(rows):
        y, start = TOP + i * band, 0.0
        drawn.append(f'<text class="row" x="8" y="{y + 13}">{escape(name)}: {number(totals[i])}</text>')
        for index, (part, sizes) in enumerate(parts):
            x, width = across.at(start), across.at(start + sizes[i]) - across.at(start)
            start += sizes[i]
            if width > 0:
                shape = f'x="{x:.1f}" y="{y + 18}" width="{width:.1f}" height="18"'
                hint = f"<title>{escape(part)}: {number(sizes[i])}</title>"
                drawn.append(f'<g>{hint}<rect class="f{index % SERIES}" {shape}/>{_hatch(index, shape)}</g>')
    legend = [(index % SERIES, name, "fill") for index, (name, _) in enumerate(parts)]
    return Chart(title, caption, _svg(title, caption, "".join(drawn), height), legend)


def _hatch(index: int, shape: str) -> str:
    return f'<rect fill="url(#hatch{index % 4})" {shape}/>' if index % 4 else ""


HATCHES = (
    '<svg class="hidden" width="0" height="0" aria-hidden="true"><defs>'
    '<pattern id="hatch1" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path class="hatch" d="M0 0V6"/></pattern>'
    '<pattern id="hatch2" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<path class="hatch" d="M3 2V4"/></pattern>'
    '<pattern id="hatch3" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">'
    '<path class="hatch" d="M0 0V6M0 3H6"/></pattern></defs></svg>'
)
"""Patterns of bars, once in a page."""


def _grid(up: _Scale) -> str:
    found = ""
    for tick in up.ticks:
        y = up.at(tick)
        found += f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        found += f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{number(tick)}</text>'
    return found


def _x_ticks(across: _Scale, height: int = HEIGHT, line: bool = False) -> str:
    found, floor = "", height - BOTTOM
    for tick in across.ticks:
        x = across.at(tick)
        found += f'<path class="grid" d="M{x:.1f} {TOP if line else floor}V{floor + 4}"/>'
        found += f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{floor + 18}">{number(tick)}</text>'
    return found


def _labels(x: str, y: str, height: int = HEIGHT) -> str:
    middle = (height - BOTTOM + TOP) / 2
    found = f'<text class="axis" text-anchor="middle" x="{(LEFT + WIDTH) / 2}" y="{height - 6}">{escape(x)}</text>'
    if y:
        turned = f'transform="rotate(-90 12 {middle})"'
        found += f'<text class="axis" text-anchor="middle" x="12" y="{middle}" {turned}>{escape(y)}</text>'
    return found


def _svg(title: str, caption: str, content: str, height: int = HEIGHT) -> str:
    said = f"<title>{escape(title)}</title><desc>{escape(caption)}</desc>"
    return f'<svg role="img" viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">{said}{content}</svg>'
