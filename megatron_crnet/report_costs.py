"""The sections on what a step costs: memory by part, recomputation, traffic."""

from __future__ import annotations

from megatron_crnet.charts import Axis, Series, stacked_bars
from megatron_crnet.report_inputs import Evidence
from megatron_crnet.report_parts import BENCHMARK, MIB, Section, Table, distinct, draw, row_name

Bytes = tuple[str, dict[str, float]]
"""A name, and bytes by part."""
LARGE = 10 * 2**30
"""Bytes from which figures are in GiB."""
PARTS = {
    "weights": "weights",
    "optimizer": "optimizer and buffers",
    "gradients": "gradients",
    "activations": "activations and temporary",
}


def memory_section(evidence: Evidence) -> Section:
    """Bars of measured, estimated and simulated memory."""
    section = Section(
        "Memory by part",
        "Bytes at the peak of a step on the fullest rank. A benchmark counts them (on CPUs bytes of tensors that are "
        "alive, on GPUs the allocator's); estimates and simulations come from their own tools.",
    )
    measured = {
        f"Memory, measured in {name}": [(row_name(row), row["memory"]) for row in distinct(rows)]
        for name, rows in evidence.measured()
    }
    figures = [(f.name, f.parts) for f in evidence.figures]
    for title, found in {**measured, **_by_size("Memory, estimated and simulated", figures)}.items():
        if found:
            names = [name for name, _ in found]
            parts = [(text, [memory.get(key, 0) for _, memory in found]) for key, text in PARTS.items()]
            _draw_sizes(section, title, "A bar is a rank; its parts add up to the peak.", names, parts)
    if not measured:
        section.absent.append(f"no measured memory: {BENCHMARK}")
    if not figures:
        section.absent.append(
            "no estimate and no simulation was given: tools/estimate.py and tools/simulate.py, --json"
        )
    return section


def _by_size(title: str, found: list[Bytes]) -> dict[str, list[Bytes]]:
    """Small and large ones in pictures of their own: a small bar cannot be read beside a large one."""
    large = [(name, parts) for name, parts in found if sum(parts.values()) >= LARGE]
    small = [(name, parts) for name, parts in found if sum(parts.values()) < LARGE]
    return {title: small, f"{title}, large": large} if small else {title: large}


def _draw_sizes(
    section: Section, title: str, caption: str, names: list[str], parts: list[tuple[str, list[float]]]
) -> None:
    """Bars and their table, in the unit that suits the largest.

    Args:
        parts: name of a part and its bytes in each row.
    """
    totals = [sum(sizes[i] for _, sizes in parts) for i in range(len(names))]
    unit, size = ("GiB", 2**30) if max(totals) >= LARGE else ("MiB", MIB)
    scaled = [(name, [value / size for value in sizes]) for name, sizes in parts]
    section.charts.append(stacked_bars(title, caption, unit, names, scaled))
    rows = [
        (name, *(f"{sizes[i]:,.2f}" for _, sizes in scaled), f"{totals[i] / size:,.2f}") for i, name in enumerate(names)
    ]
    section.tables.append(Table((f"{title}, {unit}", *(name for name, _ in parts), "all"), rows))


def recompute_section(evidence: Evidence) -> Section:
    """Marks of memory and time, measured, and of memory and operations, counted."""
    section = Section(
        "Recomputation: memory against time",
        "Each mark is a strategy; left and low is better. The first row keeps every activation.",
    )
    measured = evidence.measured("recompute")
    for benchmark, rows in measured:
        series = [Series(r["name"], [(r["peak_bytes"] / MIB, 1 / r["speed_of_first"])], line=False) for r in rows]
        axes = Axis("peak memory, MiB"), Axis(f"time, of {rows[0]['name']}")
        caption = "Measured steps: what a strategy saves in memory it pays for in time."
        draw(section, f"Peak memory and time of a step, {benchmark}", caption, *axes, series)
        table = [
            (
                row["name"],
                f"{row['peak_bytes'] / MIB:,.1f}",
                f"{row['memory']['activations'] / rows[0]['memory']['activations']:.2f}",
                f"{1 / row['speed_of_first']:.2f}",
                f"{1 / row['cpu_speed_of_first']:.2f}",
            )
            for row in rows
        ]
        header = (
            f"strategy, {benchmark}",
            "peak memory, MiB",
            "activations, of the first",
            "time, of the first",
            "CPU time",
        )
        section.tables.append(Table(header, table))
    for name, record in evidence.recompute:
        found = record["rows"]
        series = [Series(m["name"], [(m["peak"] / MIB, m["flops"] / 1e9)], line=False) for m in found]
        axes = Axis("kept and transient, MiB"), Axis("GFLOP, forward and backward")
        draw(section, f"Counted memory and operations, {name}", "Counted on the layers alone.", *axes, series)
        counted = [
            (m["name"], f"{m['kept'] / MIB:,.1f}", f"{m['peak'] / MIB:,.1f}", f"{m['flops'] / 1e9:,.1f}") for m in found
        ]
        section.tables.append(Table((f"strategy, {name}", "kept, MiB", "peak, MiB", "GFLOP"), counted))
    if not measured:
        section.absent.append(f"no measured trade: {BENCHMARK} --sweep recompute")
    return section


def traffic_section(evidence: Evidence) -> Section:
    """Bars of bytes by kind."""
    section = Section(
        "Traffic by kind",
        "Bytes of a step by group of ranks and kind of call. A benchmark's rows count all ranks together, estimates "
        "and simulations one rank. The volume of an all-gather is its output, of a reduce-scatter its input, an "
        "all-reduce counts as both.",
    )
    measured = {
        f"Traffic, counted in {name}": [(row_name(row), row["traffic"]) for row in distinct(rows) if row["traffic"]]
        for name, rows in evidence.measured()
    }
    figures = [(f.name, f.traffic) for f in evidence.figures if f.traffic]
    for title, found in {**measured, **_by_size("Traffic of a rank, estimated and simulated", figures)}.items():
        if found:
            kinds = sorted({kind for _, traffic in found for kind in traffic})
            names = [name for name, _ in found]
            parts = [(kind, [traffic.get(kind, 0) for _, traffic in found]) for kind in kinds]
            _draw_sizes(section, title, "A bar is one step.", names, parts)
    if not any(measured.values()) and not figures:
        section.absent.append(f"no row of several processes was measured: {BENCHMARK} --processes 4 --sweep layouts")
    return section
