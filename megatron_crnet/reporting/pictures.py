"""Pictures of a report: matplotlib's SVG in the colours of the page, for paper, phones and the dark.

Text stays text, in the page's fonts. Series differ by dash and marker, or by hatch, as well as by colour.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator, NullLocator

TEXT, GRID, BACK = "#010203", "#010204", "#010205"
"""Stand for the page's colours until the SVG is written; so do those of `LIGHT`."""
LIGHT = ("#0b62b4", "#b8480e", "#0a7a4b", "#8a3a9e", "#8a6d00", "#c2185b", "#00778a", "#555f6b")
DARK = ("#6cb6ff", "#ff9d57", "#5fd39a", "#d699ff", "#e8c547", "#ff7eb0", "#4fd3e6", "#b4bec9")
"""Each at least 4.5:1 against its background."""
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), "-.")
MARKERS = "os^Dv*XP"
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "+++", "|||", "//")
"""Of lines: a dot is drawn as a circle, and a page of them had megabytes."""
STEPS = (1, 2, 2.5, 5, 10)
FINE = tuple(k / 20 for k in range(20, 200))
WIDTH = 4.6
"""Inches, at 10 points per letter: readable where the picture has 340 pixels."""
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), TEXT),
    "grid.color": GRID,
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.7,
}


@dataclass(frozen=True)
class Series:
    """A line with marks, or marks alone.

    Attributes:
        points: (x, y).
        shape: which colour, dash and marker; series of one thing share it.
        line: solid, dashed, or no line at all.
        faint: to compare with, such as the ideal; without marks.
        thin: a thin line with marks, beside a thick one of the same shape.
    """

    name: str
    points: Sequence[tuple[float, float]]
    shape: int = 0
    line: bool = True
    marks: bool = True
    faint: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Lines:
    """Values over a number; `logarithmic` on both axes, where proportional is straight."""

    title: str
    caption: str
    x: str
    y: str
    series: Sequence[Series]
    logarithmic: bool = False


@dataclass(frozen=True)
class Bars:
    """Lying bars, one for each row, each of several parts: name and size in each row."""

    title: str
    caption: str
    unit: str
    rows: Sequence[str]
    parts: Sequence[tuple[str, Sequence[float]]]


Picture = Lines | Bars


def short(value: float, digits: int = 3) -> str:
    """A short number: 1,500, 12k, 3.4M, 0.05."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size * (1 - 0.5 * 10.0**-digits):  # what rounds up to the next unit is written in it
            return f"{value / (1e3 if unit == 'k' else size):.{digits}g}{unit}"
    if abs(value) >= 1000:
        return f"{value:,.{max(digits - 4, 0)}f}"
    return f"{value:.{digits}g}"


def different(values: Sequence[float]) -> list[str]:
    """Short numbers with as many digits as it takes to tell them apart."""
    for digits in range(3, 16):
        found = [short(value, digits) for value in values]
        if len(set(found)) == len(set(values)):
            break
    return found if len(values) else []


class _Numbers(Formatter):
    def __call__(self, value: float, position: int | None = None) -> str:
        return short(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return different(values)


def svg(picture: Picture) -> str:
    """The picture, to stand in an HTML page that defines the colours (`colours`).

    Raises:
        ValueError: it has nothing to show.
    """
    with matplotlib.rc_context(STYLE):
        figure = _lines(picture) if isinstance(picture, Lines) else _bars(picture)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    return _in_page_colours(target.getvalue(), picture)


def _in_page_colours(text: str, picture: Picture) -> str:
    text = text[text.index("<svg") :]
    for name, colour in (("text", TEXT), ("line", GRID), ("back", BACK), *((f"c{i}", c) for i, c in enumerate(LIGHT))):
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r' id="[a-zA-Z.]+_[\d.]+"', "", text)  # the same in every picture
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")  # as wide as what was measured
    said = f"<title>{escape(picture.title)}</title><desc>{escape(picture.caption)}</desc>"
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">{said}', text, count=1)
    return text.replace("{said}", said, 1)


def colours(palette: Sequence[str]) -> str:
    """The palette as CSS variables."""
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.grid(True, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    # a leading underscore would hide an entry
    labels = [textwrap.fill(f"\u200b{name}", 42) for name in names]
    columns = 2 if all(len(name) < 21 for name in names) else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def _lines(picture: Lines) -> Figure:
    kept = [(s, [p for p in s.points if all(map(math.isfinite, p))]) for s in picture.series]
    kept = [(s, [p for p in points if not picture.logarithmic or min(p) > 0]) for s, points in kept]
    kept = [(s, points) for s, points in kept if points]
    if not kept:
        raise ValueError("nothing to draw")
    figure, axes = _figure(2.9 + 0.2 * len(kept))
    handles: list[Any] = []
    for series, points in kept:
        colour = GRID if series.faint else LIGHT[series.shape % len(LIGHT)]
        handles += axes.plot(
            *zip(*points, strict=True),
            color=TEXT if series.faint else colour,
            linewidth=0.9 if series.faint or series.thin else 1.6,
            linestyle=DASHES[series.shape % len(DASHES)] if series.line else "none",
            marker=MARKERS[series.shape % len(MARKERS)] if series.marks and not series.faint else None,
            markersize=4.5,
            markerfacecolor=BACK if series.shape >= len(MARKERS) else colour,
        )
    axes.set(xlabel=picture.x, ylabel=picture.y)
    xs, ys = ([p[i] for _, points in kept for p in points] for i in (0, 1))
    if picture.logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sorted(set(xs)))
        axes.set_xlim(min(xs) / 1.15, max(xs) * 1.15)
        axes.set_yticks(_log_ticks(ys))
    else:
        axes.set(xlim=_span(xs), ylim=_span(ys))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=STEPS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(_Numbers())
    _legend(figure, handles, [s.name for s, _ in kept])
    return figure


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that do not blow up what is equal but for rounding."""
    low, high = min(values), max(values)
    least = 0.02 * max(abs(low), abs(high)) or 1.0
    margin = max(0.05 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Three to eight round numbers around the values, if there are as many."""
    low, high = min(values) / 1.1, max(values) * 1.1
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), FINE):
        found = [power * step for power in powers for step in steps if low <= power * step <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 8)]


def _bars(picture: Bars) -> Figure:
    totals = [sum(sizes[i] for _, sizes in picture.parts) for i in range(len(picture.rows))]
    if not any(totals):
        raise ValueError("nothing to draw")
    labels = [textwrap.fill(f"{name}: {short(total, 4)}", 54) for name, total in zip(picture.rows, totals, strict=True)]
    parts = [part for part in picture.parts if any(part[1])]
    places, y = [], 0.0
    for label in labels:
        y += 0.16 + 0.16 * (label.count("\n") + 1)
        places.append(y)
        y += 0.2
    figure, axes = _figure(y + 0.8 + 0.1 * (len(parts) + 1))
    for place, label in zip(places, labels, strict=True):
        axes.text(0, place - 0.06, label, verticalalignment="bottom")
    start, handles = [0.0] * len(labels), []
    for i, (_, sizes) in enumerate(parts):
        colour, hatch = LIGHT[i % len(LIGHT)], HATCHES[i % len(HATCHES)]
        at = [place + 0.06 for place in places]
        handles.append(axes.barh(at, sizes, 0.17, start, facecolor=colour, edgecolor=BACK, hatch=hatch, linewidth=0.5))
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.set(ylim=(y, 0), xlim=(0, max(totals) * 1.02), xlabel=picture.unit)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.xaxis.set_major_formatter(_Numbers())
    _legend(figure, handles, [name for name, _ in parts])
    return figure
