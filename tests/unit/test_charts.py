"""Pictures are whole XML, say what they show, and put values where they belong."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from megatron_crnet.charts import DASHES, HEIGHT, LEFT, WIDTH, Axis, Series, line_chart, marker, number, stacked_bars

SVG = "{http://www.w3.org/2000/svg}"


def places(svg: str) -> list[tuple[float, float]]:
    line = ElementTree.fromstring(svg).find(f".//{SVG}polyline")
    assert line is not None
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]  # type: ignore[misc]


def test_a_line_lies_within_the_axes_and_the_ideal_of_scaling_doubles() -> None:
    series = [Series("a < b", [(1, 1), (2, 2), (4, 4), (8, math.nan)])]
    chart = line_chart("A & B", "caption", Axis("ranks", logarithmic=True), Axis("speed", zero=True), series)
    found = places(chart.svg)
    assert len(found) == 3  # what is not finite is left out
    assert all(LEFT <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in found)
    assert found[1][0] - found[0][0] == pytest.approx(found[2][0] - found[1][0], abs=0.2)
    assert found[1][1] - found[2][1] == pytest.approx(2 * (found[0][1] - found[1][1]), abs=0.2)
    root = ElementTree.fromstring(chart.svg)
    assert root.find(f"{SVG}title").text == "A & B"  # type: ignore[union-attr]
    assert root.find(f"{SVG}desc").text == "caption"  # type: ignore[union-attr]
    assert {"ranks", "speed", "1", "2", "4"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_series_differ_by_more_than_colour() -> None:
    shapes = [(re.sub(r"m\d", "", marker(i, 0, 0)), DASHES[i]) for i in range(8)]
    assert len(set(shapes)) == 8
    assert len({shape for shape, _ in shapes}) == 8


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart("t", "c", Axis("x"), Axis("y"), [Series("a", [(1, math.inf)]), Series("b", [])])


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 5.0], [1e15, 2e15]])
def test_any_values_have_axes(values: list[float]) -> None:
    chart = line_chart("t", "c", Axis("x"), Axis("y"), [Series("a", list(enumerate(values)))])
    assert ElementTree.fromstring(chart.svg) is not None
    assert "nan" not in chart.svg


def test_bars_are_as_long_as_their_parts() -> None:
    chart = stacked_bars("t", "c", "MiB", ["one", "two"], [("a", [10, 20]), ("b", [30, 0])])
    root = ElementTree.fromstring(chart.svg)
    bars = [r for r in root.iter(f"{SVG}rect") if r.attrib.get("class", "").startswith("f")]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.3)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.3)
    assert len(bars) == 3  # nothing for a part of no size
    assert [bar.attrib["class"] for bar in bars] == ["f0", "f1", "f0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1500, "1,500"), (12000, "12k"), (3.4e6, "3.4M"), (2e9, "2G"), (999999, "1M")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
