"""The sections on how fast: loss, speed by ranks, scaling, layouts."""

from __future__ import annotations

from typing import Any

from megatron_crnet.charts import Axis, Series
from megatron_crnet.report_inputs import Evidence, Run
from megatron_crnet.report_parts import BENCHMARK, MIB, Section, Table, draw, milliseconds, or_dash


def loss_section(evidence: Evidence) -> Section:
    """Curves over tokens and over time."""
    section = Section(
        "Loss",
        "Lower is better. The same runs twice: over tokens, where only the method counts, and over time, where speed "
        "counts as well. Lines are training loss, means since the last line; the table ends with validation loss.",
    )
    if not evidence.runs:
        section.absent.append("no run was given: pass the folder that pretrain_crnet.py has written")
        return section
    for title, x, points in (
        ("Training loss over tokens", "tokens", Run.points),
        ("Training loss over time", "seconds of training", Run.points_over_time),
    ):
        series = [Series(run.name, points(run, "loss"), marks=len(evidence.runs) > 1) for run in evidence.runs]
        caption = "Each line is a run; a line below another has learnt more by then."
        draw(section, title, caption, Axis(x), Axis("loss, nats a token"), series)
    rows = []
    for run in evidence.runs:
        seconds, loss = run.points_over_time("loss")[-1]
        validation = run.points("validation_loss")
        last = f"{validation[-1][1]:.4f}" if validation else "-"
        rows.append((run.name, f"{run.points('loss')[-1][0]:,.0f}", f"{seconds:.0f}", f"{loss:.4f}", last))
    section.tables.append(Table(("run", "tokens", "seconds", "last training loss", "last validation loss"), rows))
    if not any(run.points("validation_loss") for run in evidence.runs):
        section.absent.append("no run has a validation loss: train with training.eval_steps above 0")
    return section


def speed_section(evidence: Evidence, peak_flops: float | None) -> Section:
    """Tokens a second and MFU of runs and benchmarks by ranks, with the ideal line."""
    section = Section(
        "Speed by number of ranks",
        "Tokens a second of the whole run, and MFU: the share of the devices' peak that the model's operations are. "
        "The ideal is the first point times the number of ranks. Runs were not measured side by side: on a shared "
        "machine believe the benchmark's figures and not theirs.",
    )
    runs = [(run, run.processes, run.median("tokens_per_s")) for run in evidence.runs]
    of_runs = [(n, speed) for _, n, speed in runs if n is not None and speed is not None]
    series = [Series("runs", sorted(of_runs), line=False)] if of_runs else []
    for sweep, name, rows in _scaled(evidence):
        points = [(row["processes"], row["tokens_per_s"]) for row in rows]
        series.append(Series(f"{name}, {sweep} scaling", sorted(points)))
    first = next((s.points[0] for s in series[::-1] if s.line), None) or (of_runs and min(of_runs)) or None
    if first:
        ranks_seen = sorted({p[0] for s in series for p in s.points})
        ideal = [(n, first[1] * n / first[0]) for n in ranks_seen]
        series.append(Series("ideal", ideal, marks=False, faint=True))
        caption = "On the ideal line twice the ranks do twice the tokens."
        ranks, speed = Axis("ranks", logarithmic=True), Axis("tokens a second", zero=True)
        draw(section, "Tokens a second", caption, ranks, speed, series)
    _mfu(section, evidence, runs, peak_flops)
    if not _scaled(evidence):
        section.absent.append(f"no benchmark over numbers of ranks was given: {BENCHMARK} --processes 8 --sweep strong")
    if unknown := [run.name for run, n, _ in runs if n is None]:
        section.absent.append(f"the number of processes of {', '.join(unknown)} is not known: run.json is not there")
    return section


def _mfu(
    section: Section,
    evidence: Evidence,
    runs: list[tuple[Run, int | None, float | None]],
    peak_flops: float | None,
) -> None:
    rows, series = [], []
    for sweep, name, found in _scaled(evidence):
        measured = [row for row in found if row.get("mfu") is not None]
        points = [(row["processes"], 100 * row["mfu"]) for row in measured]
        series.append(Series(f"{name}, {sweep} scaling", sorted(points)))
        rows += [
            (f"{name}, {sweep}", str(row["processes"]), f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}")
            for row in measured
        ]
    of_runs = []
    for run, processes, speed in runs:
        rate, share = run.median("tflops_per_device"), "peak not given"
        if peak_flops and rate and processes:
            of_runs.append((processes, 100 * rate * 1e12 / peak_flops))
            share = f"{of_runs[-1][1]:.1f}%"
        rows.append((f"run {run.name}", or_dash(processes), f"{speed:,.0f}" if speed else "-", share))
    if of_runs:
        series.insert(0, Series("runs", sorted(of_runs), line=False))
    if series:
        caption = "Level is ideal: each device does as much as it did alone."
        axes = Axis("ranks", logarithmic=True), Axis("MFU, percent", zero=True)
        draw(section, "Model FLOPs utilization", caption, *axes, series)
    elif runs:
        section.absent.append("no MFU of runs: give the peak of one device as --peak-tflops")
    if rows:
        section.tables.append(Table(("measured in", "ranks", "tokens/s", "MFU"), rows))


def scaling_section(evidence: Evidence, sweep: str, meaning: str) -> Section:
    """Speed-up of one sweep, `strong` or `weak`."""
    section = Section(
        f"{sweep.capitalize()} scaling",
        f"Speed with {meaning}, in units of the smallest world: medians of ratios within repeats, which hold on a busy "
        "machine as well. Efficiency is speed-up over ranks; processes that share cores cannot reach 100%.",
    )
    found = evidence.measured(sweep)
    if not found:
        section.absent.append(f"not measured: {BENCHMARK} --processes 8 --sweep {sweep}")
        return section
    series = [Series(name, sorted((row["processes"], row["speed_of_first"]) for row in rows)) for name, rows in found]
    seen = sorted({n for s in series for n, _ in s.points})
    series.append(Series("ideal", [(n, n / seen[0]) for n in seen], marks=False, faint=True))
    caption = "The gap to the ideal line is what communication, and sharing cores, cost."
    axes = Axis("ranks", logarithmic=True), Axis("speed of the smallest world", zero=True)
    draw(section, f"Speed-up, {sweep} scaling", caption, *axes, series)
    table = [
        (
            name,
            str(row["processes"]),
            f"{row['tokens_per_step']:,}",
            milliseconds(row),
            f"{row['spread']:.0%}",
            f"{row['speed_of_first']:.2f}",
            f"{row['speed_of_first'] * rows[0]['processes'] / row['processes']:.0%}",
        )
        for name, rows in found
        for row in rows
    ]
    header = ("benchmark", "ranks", "tokens a step", "ms a step", "spread", "speed-up", "efficiency")
    section.tables.append(Table(header, table))
    return section


def layouts_section(evidence: Evidence) -> Section:
    """Rows that no picture suits."""
    section = Section(
        "Layouts, ranks and other rows", "Speed in units of the first row of each sweep, by the clock and by CPU time."
    )
    found = evidence.measured("layouts", "ranks", "rows")
    if not found:
        section.absent.append(f"not measured: {BENCHMARK} --sweep ranks --processes 4 --sweep layouts")
        return section
    table = [
        (
            name,
            row["sweep"],
            row["name"],
            str(row["processes"]),
            milliseconds(row),
            f"{row['spread']:.0%}",
            f"{row['speed_of_first']:.2f}",
            f"{row['cpu_speed_of_first']:.2f}",
            f"{row['peak_bytes'] / MIB:,.1f}",
        )
        for name, rows in found
        for row in rows
    ]
    header = ("benchmark", "sweep", "row", "ranks", "ms a step", "spread", "speed", "by CPU time", "peak memory, MiB")
    section.tables.append(Table(header, table))
    return section


def _scaled(evidence: Evidence) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(sweep, benchmark, rows) of everything that was measured over numbers of ranks."""
    return [(sweep, name, rows) for sweep in ("strong", "weak") for name, rows in evidence.measured(sweep)]
