"""Pictures are whole XML in the page's colours, say what they show, and put values where they belong."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pandas as pd
import pytest

from megatron_crnet.reporting.pictures import (
    DASHES,
    LIGHT,
    MARKERS,
    Bars,
    Lines,
    Picture,
    Series,
    _figure,
    _lines,
    _log_ticks,
    _span,
    short,
    svg,
)

SVG = "{http://www.w3.org/2000/svg}"
LINK = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def parsed(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(svg(picture).replace("<svg", f"<svg{LINK}", 1))


def texts(picture: Picture) -> list[str]:
    return ["".join(node.itertext()).strip("\u200b \n") for node in parsed(picture).iter(f"{SVG}text")]


def scaling(*points: tuple[float, float]) -> Lines:
    ideal = Series("ideal", [(1, 10), (2, 20), (4, 40), (8, 80)], kind="ideal")
    return Lines("A & B", "caption <", "ranks", "tokens/s", [Series("a < b", points), ideal], logarithmic=True)


@pytest.mark.fault("section-5")
def test_ideal_scaling_is_a_straight_line() -> None:
    axes = _lines(scaling((1, 10), (2, 17), (4, 25), (8, float("nan")))).axes[0]
    drawn, ideal = axes.get_lines()
    assert len(drawn.get_xdata()) == 3  # what is not finite is left out
    places = axes.transData.transform(list(zip(ideal.get_xdata(), ideal.get_ydata(), strict=True)))
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)]
    assert steps[1] == pytest.approx(steps[0])
    assert steps[2] == pytest.approx(steps[0])


def test_a_picture_says_what_it_shows_in_the_colours_of_the_page() -> None:
    picture = scaling((1, 10), (2, 17))
    root = parsed(picture)
    assert root.find(f"{SVG}title").text == "A & B"  # type: ignore[union-attr]
    assert root.find(f"{SVG}desc").text == "caption <"  # type: ignore[union-attr]
    assert {"ranks", "tokens/s", "1", "2", "4", "8", "a < b", "ideal"} <= set(texts(picture))
    assert set(re.findall(r"#[0-9a-f]{6}", svg(picture))) == set()  # else it could not be read in the dark
    assert not re.search(r' id="(figure|axes|text)', svg(picture))  # of which a page has many


def test_series_differ_by_more_than_colour() -> None:
    shapes = [(DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]) for i in range(len(LIGHT))]
    assert len(set(shapes)) == len({marker for _, marker in shapes}) == len(LIGHT)


@pytest.mark.parametrize("name", ["_hidden", "$x^2$", "a\u0301 \u6a21\u578b", "<script>", "&amp;", "x" * 300])
def test_a_name_is_drawn_as_it_is(name: str) -> None:
    found = "".join(texts(Lines("t", "c", "x", "y", [Series(name, [(1, 1), (2, 2)])])))
    assert name in found.replace("\u200b", "")


@pytest.mark.parametrize("points", [[(1, float("inf"))], [], [(float("nan"), 1.0)]])
def test_nothing_to_draw_is_said(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        svg(Lines("t", "c", "x", "y", [Series("a", points)]))
    with pytest.raises(ValueError, match="nothing to draw"):
        svg(Bars("t", "c", "MiB", pd.DataFrame({"b": [0.0]}, index=["a"])))


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 5.0], [1e29, 2e29], [1e-29, 1e29]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_values_have_axes(values: list[float], logarithmic: bool) -> None:
    picture = Lines("t", "c", "x", "y", [Series("a", [*enumerate(values, 1)])], logarithmic)
    if logarithmic and max(values) <= 0:
        return
    assert parsed(picture) is not None
    assert "nan" not in svg(picture)


@pytest.mark.fault("section-5")
@pytest.mark.parametrize(
    "values", [[3820.1, 3820.4, 3821.0], [1.0001, 1.0002], [5e11, 5.001e11, 6e12], [0, 0.25, 0.5], [9999, 10001]]
)
def test_tick_labels_differ(values: list[float]) -> None:
    assert len({short(value) for value in values}) == len(values)


@pytest.mark.fault("section-5")
def test_what_is_equal_but_for_rounding_is_not_blown_up() -> None:
    low, high = _span([3869.92927, 3869.92939])
    assert high - low > 70
    assert _span([0.0, 0.0]) == (-0.5, 0.5)


@pytest.mark.parametrize("values", [[1.0, 4.0], [2438.0, 12000.0], [11.5, 54.0], [1.0, 1e6], [5.0, 5.1]])
def test_a_logarithmic_axis_has_some_round_numbers(values: list[float]) -> None:
    ticks = _log_ticks(values)
    assert 3 <= len(ticks) <= 8
    assert all(min(values) / 1.2 <= tick <= max(values) * 1.2 for tick in ticks)


@pytest.mark.fault("section-5")
@pytest.mark.parametrize(
    "name", ["short", "recompute: replay, attention kept, of a benchmark with a long name, 64 ranks"]
)
def test_nothing_is_cut_at_the_right_edge(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from megatron_crnet.reporting import pictures

    bars = Bars("t", "c", "MiB", pd.DataFrame({"weights": [123456.0], "x" * 80: [1.0]}, index=[name]))
    for figure in (pictures._bars(bars), _lines(scaling((1, 10), (2, 123456789)))):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        box = figure.get_tightbbox(renderer)
        assert box.x0 >= -0.01
        assert box.x1 <= figure.get_size_inches()[0] + 0.01
    assert _figure(1.0)[0].get_size_inches()[0] == figure.get_size_inches()[0]


def test_bars_are_as_long_as_their_parts() -> None:
    from megatron_crnet.reporting import pictures

    bars = Bars("t", "c", "MiB", pd.DataFrame({"a": [10, 20], "b": [30, 0], "none": [0, 0]}, index=["one", "two"]))
    axes = pictures._bars(bars).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [10, 20, 30, 0]
    assert [patch.get_x() for patch in axes.patches] == [0, 0, 10, 20]
    assert {"one: 40", "two: 20", "a", "b"} <= set(texts(bars))
    assert "none" not in texts(bars)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1500, "1.5k"), (12000, "12k"), (3.4e6, "3.4M"), (2e9, "2G"), (999999.9, "1M")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
