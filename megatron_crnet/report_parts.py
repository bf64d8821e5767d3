"""What sections of a scaling report consist of, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_crnet.charts import Axis, Chart, Series, line_chart

MIB = 2**20
BENCHMARK = "python tools/benchmark.py --config FILE --json benchmark.json"
"""How what is absent can be made."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, and above it what they are of, where the section does not say it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass
class Section:
    """One question of the report.

    Attributes:
        text: how to read it.
        absent: what is not there, and the command that makes it.
    """

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


def draw(section: Section, title: str, caption: str, x: Axis, y: Axis, series: list[Series]) -> None:
    """Add a line chart, or say that there is nothing to draw."""
    try:
        section.charts.append(line_chart(title, caption, x, y, series))
    except ValueError:
        section.absent.append(f"{title}: nothing to draw")


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without rows that another sweep has measured already, which have the same times to the last digit."""
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["median_s"], row["spread"]), row)
    return list(found.values())


def row_name(row: dict[str, Any]) -> str:
    """A row among those of other sweeps."""
    processes = f", {row['processes']} ranks" if row["processes"] > 1 and "process" not in row["name"] else ""
    return f"{row['sweep']}: {row['name']}{processes}" if row["sweep"] != "variants" else f"{row['name']}{processes}"


def milliseconds(row: dict[str, Any]) -> str:
    """The median step."""
    return f"{row['median_s'] * 1e3:,.0f}"


def or_dash(value: Any) -> str:
    """A value that may be unknown."""
    return "-" if value is None else str(value)


def count_processes(count: int | None) -> str:
    """In words."""
    return "processes not known" if count is None else "1 process" if count == 1 else f"{count} processes"
