"""Figures of a report: matplotlib's SVG in the page's colours, so that they follow its light and dark mode.

Text stays text, in the page's fonts. Series differ by dash and marker, or by hatch, as well as by colour.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

TEXT, GRID, BACK = "#010203", "#010204", "#010205"
"""Replaced by the page's CSS variables in the SVG, as are those of `LIGHT`."""
LIGHT = ("#0b62b4", "#b8480e", "#0a7a4b", "#8a3a9e", "#8a6d00", "#c2185b", "#00778a", "#555f6b")
DARK = ("#6cb6ff", "#ff9d57", "#5fd39a", "#d699ff", "#e8c547", "#ff7eb0", "#4fd3e6", "#b4bec9")
"""Each at least 4.5:1 against its background."""
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), "-.")
MARKERS = "os^Dv*XP"
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "+++", "|||", "//")
"""Of lines alone: dots are drawn as circles, which makes a page megabytes long."""
STEPS = (1, 2, 2.5, 5, 10)
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
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
}


KINDS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "unmarked": {"linewidth": 1.6, "marker": None},
    "thin": {"linewidth": 0.9},
    "marks": {"linestyle": "none"},
    "ideal": {"linewidth": 0.9, "marker": None, "color": TEXT},
}


@dataclass(frozen=True)
class Series:
    """A line with marks, or another one of `KINDS`.

    Attributes:
        points: (x, y).
        shape: which colour, dash and marker; series of one thing share it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    shape: int = 0
    kind: str = "line"


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
    """Horizontal stacked bars: a bar per row of `sizes`, a part per column."""

    title: str
    caption: str
    unit: str
    sizes: pd.DataFrame


Picture = Lines | Bars


numbers = EngFormatter(sep="")
"""12k, 3.4M, 0.05: the prefixes of large numbers alone."""
numbers.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "G", 12: "T"}
short = numbers.format_data


def svg(picture: Picture) -> str:
    """The picture, to stand in an HTML page that defines the colours (`colours`).

    Raises:
        ValueError: it has nothing to show.
    """
    with matplotlib.rc_context(STYLE):
        figure = _lines(picture) if isinstance(picture, Lines) else _bars(picture)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    for name, colour in (("text", TEXT), ("line", GRID), ("back", BACK), *((f"c{i}", c) for i, c in enumerate(LIGHT))):
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r' id="[a-zA-Z.]+_[\d.]+"', "", text)  # the same in every picture
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")  # as wide as what was measured
    head, _, body = text[text.index("<svg") :].partition(">")
    view = re.findall('viewBox="[^"]*"', head)[0]
    return f'<svg role="img" {view}><title>{escape(picture.title)}</title><desc>{escape(picture.caption)}</desc>{body}'


def colours(palette: Sequence[str]) -> str:
    """The palette as CSS variables."""
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    # a leading underscore would hide an entry
    labels = [textwrap.fill(f"\u200b{name}", 42) for name in names]
    columns = 2 if all(len(name) < 21 for name in names) else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def _lines(picture: Lines) -> Figure:
    least = 0.0 if picture.logarithmic else -math.inf
    kept = [(s, [p for p in s.points if all(least < value < math.inf for value in p)]) for s in picture.series]
    kept = [(s, points) for s, points in kept if points]
    if not kept:
        raise ValueError("nothing to draw")
    figure, axes = _figure(2.9 + 0.2 * len(kept))
    handles: list[Any] = []
    for series, points in kept:
        i, colour = series.shape, LIGHT[series.shape % len(LIGHT)]
        shape = {"color": colour, "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
        face = {"markersize": 4.5, "markerfacecolor": BACK if i >= len(MARKERS) else colour}
        handles += axes.plot(*zip(*points, strict=True), **{**shape, **face, **KINDS[series.kind]})
    axes.set(xlabel=picture.x, ylabel=picture.y)
    xs, ys = ([p[i] for _, points in kept for p in points] for i in (0, 1))
    if picture.logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted(set(xs)) if len(set(xs)) <= 12 else _log_ticks(xs)
        axes.set(xticks=ticks, xlim=(min(xs) / 1.15, max(xs) * 1.15), yticks=_log_ticks(ys))
    else:
        axes.set(xlim=_span(xs), ylim=_span(ys))
    for axis in (axes.xaxis, axes.yaxis):
        if not picture.logarithmic:
            axis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(copy(numbers))
    _legend(figure, handles, [s.name for s, _ in kept])
    return figure


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that do not blow up what is equal but for rounding."""
    low, high = min(values), max(values)
    least = 0.02 * max(abs(low), abs(high)) or 1.0
    margin = max(0.05 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Three to eight round numbers around the values."""
    low, high = min(values) / 1.1, max(values) * 1.1
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8), np.arange(1, 10, 0.5), np.arange(1, 10, 0.05)):
        found = np.multiply.outer(powers, steps).ravel()
        found = found[(low <= found) & (found <= high)]
        if len(found) >= 3:
            break
    return [float(tick) for tick in found[:: math.ceil(len(found) / 8)]]


def _bars(picture: Bars) -> Figure:
    totals = picture.sizes.sum(axis=1)
    if not totals.any():
        raise ValueError("nothing to draw")
    parts = picture.sizes.loc[:, picture.sizes.any()]
    labels = [textwrap.fill(f"{name}: {short(total)}", 54) for name, total in totals.items()]
    heights = [0.52 + 0.16 * label.count("\n") for label in labels]
    places = np.cumsum(heights) - 0.2
    figure, axes = _figure(sum(heights) + 0.8 + 0.1 * (len(parts.columns) + 1))
    for place, label in zip(places, labels, strict=True):
        axes.text(0, place - 0.06, label, verticalalignment="bottom")
    start, handles = np.zeros(len(labels)), []
    for i, (_, sizes) in enumerate(parts.items()):
        style: dict[str, Any] = {"facecolor": LIGHT[i % len(LIGHT)], "hatch": HATCHES[i % len(HATCHES)]}
        handles.append(axes.barh(places + 0.06, sizes, 0.17, start, edgecolor=BACK, linewidth=0.5, **style))
        start = start + sizes.to_numpy()
    axes.set(ylim=(sum(heights), 0), xlim=(0, totals.max() * 1.02), xlabel=picture.unit, yticks=[])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.xaxis.set_major_formatter(copy(numbers))
    _legend(figure, handles, [*parts.columns])
    return figure
