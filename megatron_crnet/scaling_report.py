"""What a scaling report says: sections with pictures and tables, from whatever evidence there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_crnet.arithmetic import flops_per_token, total_parameters
from megatron_crnet.charts import Axis, Chart, Series, line_chart, stacked_bars
from megatron_crnet.report_inputs import Evidence, Run

MIB = 2**20
PARTS = {
    "weights": "weights",
    "optimizer": "optimizer and buffers",
    "gradients": "gradients",
    "activations": "activations and temporary",
}
BENCHMARK = "python tools/benchmark.py --config FILE --json benchmark.json"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


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


def build_sections(evidence: Evidence, peak_flops: float | None, command: str) -> list[Section]:
    """All sections, also those that can only say what is absent.

    Args:
        peak_flops: of one device, for the MFU of runs; benchmarks bring their own.
        command: that makes this report.
    """
    return [
        _what_was_read(evidence),
        _loss(evidence),
        _speed(evidence, peak_flops),
        _scaling(evidence, "strong", "the same global batch on more processes"),
        _scaling(evidence, "weak", "a global batch that grows with the processes"),
        _layouts(evidence),
        _memory(evidence),
        _recompute(evidence),
        _traffic(evidence),
        _variants(evidence),
        _provenance(evidence, command),
    ]


def _what_was_read(evidence: Evidence) -> Section:
    section = Section("What this report is made from", "Everything that was read; what was not read is named below it.")
    rows = [("run", run.name, f"{len(run.lines)} lines, {_processes(run.processes)}") for run in evidence.runs]
    for name, record in evidence.benchmarks:
        whole = "" if record.get("complete") else ", stopped before its end"
        device = record.get("device")
        on = "a CPU: its ratios count, its absolute figures are those of a small machine" if device == "cpu" else device
        rows.append(("benchmark", name, f"{len(record['rows'])} measured rows on {on}{whole}"))
    rows += [("estimate or simulation", figures.name, "memory and traffic of a rank") for figures in evidence.figures]
    rows += [("recomputation", name, f"{len(found)} strategies, counted") for name, found in evidence.recompute]
    section.tables.append(Table(("kind", "name", "what"), rows))
    section.absent += evidence.problems
    return section


def _loss(evidence: Evidence) -> Section:
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
        _draw(section, title, caption, Axis(x), Axis("loss, nats a token"), series)
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


def _speed(evidence: Evidence, peak_flops: float | None) -> Section:
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
        _draw(section, "Tokens a second", caption, ranks, speed, series)
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
        rows.append((f"run {run.name}", _or_dash(processes), f"{speed:,.0f}" if speed else "-", share))
    if of_runs:
        series.insert(0, Series("runs", sorted(of_runs), line=False))
    if series:
        caption = "Level is ideal: each device does as much as it did alone."
        axes = Axis("ranks", logarithmic=True), Axis("MFU, percent", zero=True)
        _draw(section, "Model FLOPs utilization", caption, *axes, series)
    elif runs:
        section.absent.append("no MFU of runs: give the peak of one device as --peak-tflops")
    if rows:
        section.tables.append(Table(("measured in", "ranks", "tokens/s", "MFU"), rows))


def _scaling(evidence: Evidence, sweep: str, meaning: str) -> Section:
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
    _draw(section, f"Speed-up, {sweep} scaling", caption, *axes, series)
    table = [
        (
            name,
            str(row["processes"]),
            f"{row['tokens_per_step']:,}",
            _milliseconds(row),
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


def _layouts(evidence: Evidence) -> Section:
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
            _milliseconds(row),
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


def _memory(evidence: Evidence) -> Section:
    section = Section(
        "Memory by part",
        "Bytes at the peak of a step on the fullest rank. A benchmark counts them (on CPUs bytes of tensors that are "
        "alive, on GPUs the allocator's); estimates and simulations come from their own tools.",
    )
    measured = {
        f"Memory, measured in {name}": [(_row_name(row), row["memory"]) for row in _distinct(rows)]
        for name, rows in evidence.measured()
    }
    figures = [(f.name, f.parts) for f in evidence.figures]
    for title, found in {**measured, "Memory, estimated and simulated": figures}.items():
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


def _draw_sizes(
    section: Section, title: str, caption: str, names: list[str], parts: list[tuple[str, list[float]]]
) -> None:
    """Bars and their table, in the unit that suits the largest.

    Args:
        parts: name of a part and its bytes in each row.
    """
    totals = [sum(sizes[i] for _, sizes in parts) for i in range(len(names))]
    unit, size = ("GiB", 2**30) if max(totals) >= 10 * 2**30 else ("MiB", MIB)
    scaled = [(name, [value / size for value in sizes]) for name, sizes in parts]
    section.charts.append(stacked_bars(title, caption, unit, names, scaled))
    rows = [
        (name, *(f"{sizes[i]:,.2f}" for _, sizes in scaled), f"{totals[i] / size:,.2f}") for i, name in enumerate(names)
    ]
    section.tables.append(Table((f"{title}, {unit}", *(name for name, _ in parts), "all"), rows))


def _recompute(evidence: Evidence) -> Section:
    section = Section(
        "Recomputation: memory against time",
        "Each mark is a strategy; left and low is better. The first row keeps every activation.",
    )
    measured = evidence.measured("recompute")
    for benchmark, rows in measured:
        series = [Series(r["name"], [(r["peak_bytes"] / MIB, 1 / r["speed_of_first"])], line=False) for r in rows]
        axes = Axis("peak memory, MiB"), Axis(f"time, of {rows[0]['name']}")
        caption = "Measured steps: what a strategy saves in memory it pays for in time."
        _draw(section, f"Peak memory and time of a step, {benchmark}", caption, *axes, series)
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
    for name, found in evidence.recompute:
        series = [Series(m["name"], [(m["peak"] / MIB, m["flops"] / 1e9)], line=False) for m in found]
        axes = Axis("kept and transient, MiB"), Axis("GFLOP, forward and backward")
        _draw(section, f"Counted memory and operations, {name}", "Counted on the layers alone.", *axes, series)
        counted = [
            (m["name"], f"{m['kept'] / MIB:,.1f}", f"{m['peak'] / MIB:,.1f}", f"{m['flops'] / 1e9:,.1f}") for m in found
        ]
        section.tables.append(Table((f"strategy, {name}", "kept, MiB", "peak, MiB", "GFLOP"), counted))
    if not measured:
        section.absent.append(f"no measured trade: {BENCHMARK} --sweep recompute")
    return section


def _traffic(evidence: Evidence) -> Section:
    section = Section(
        "Traffic by kind",
        "Bytes of a step by group of ranks and kind of call. A benchmark's rows count all ranks together, estimates "
        "and simulations one rank. The volume of an all-gather is its output, of a reduce-scatter its input, an "
        "all-reduce counts as both.",
    )
    measured = {
        f"Traffic, counted in {name}": [(_row_name(row), row["traffic"]) for row in _distinct(rows) if row["traffic"]]
        for name, rows in evidence.measured()
    }
    figures = [(f.name, f.traffic) for f in evidence.figures if f.traffic]
    for title, found in {**measured, "Traffic of a rank, estimated and simulated": figures}.items():
        if found:
            kinds = sorted({kind for _, traffic in found for kind in traffic})
            names = [name for name, _ in found]
            parts = [(kind, [traffic.get(kind, 0) for _, traffic in found]) for kind in kinds]
            _draw_sizes(section, title, "A bar is one step.", names, parts)
    if not any(measured.values()) and not figures:
        section.absent.append(f"no row of several processes was measured: {BENCHMARK} --processes 4 --sweep layouts")
    return section


def _variants(evidence: Evidence) -> Section:
    section = Section(
        "Variants",
        "Parameters and operations by formula; speed in units of the first row of the same benchmark; perplexity at "
        "the end of each run. Runs of different length or data cannot be compared.",
    )
    measured, runs = evidence.measured("variants"), [run for run in evidence.runs if run.config is not None]
    if measured:
        rows = [
            (
                name,
                row["name"],
                f"{row['parameters'] / 1e6:.2f}M",
                f"{row['flops_per_token'] / 1e6:.1f}M",
                f"{row['speed_of_first']:.2f}",
                f"{row['cpu_speed_of_first']:.2f}",
                f"{row['peak_bytes'] / MIB:,.1f}",
            )
            for name, found in measured
            for row in found
        ]
        header = ("benchmark", "variant", "parameters", "FLOPs a token", "speed", "by CPU time", "peak memory, MiB")
        section.tables.append(Table(header, rows))
    if not measured:
        section.absent.append(f"speed and memory were not measured: {BENCHMARK} --sweep variants")
    if runs:
        columns = ("run", "variant", "parameters", "FLOPs a token", "tokens", "validation perplexity")
        section.tables.append(Table(columns, [_quality(run) for run in runs]))
    else:
        section.absent.append("no run with a config.yaml was given, so there is no perplexity")
    return section


def _quality(run: Run) -> tuple[str, ...]:
    assert run.config is not None
    model, found = run.config.model, run.points("validation_perplexity")
    return (
        run.name,
        model.variant,
        f"{total_parameters(model) / 1e6:.2f}M",
        f"{flops_per_token(model, run.config.training.seq_length) / 1e6:.1f}M",
        f"{run.points('loss')[-1][0]:,.0f}",
        f"{found[-1][1]:.2f}" if found else "-",
    )


def _provenance(evidence: Evidence, command: str) -> Section:
    section = Section("Machine, versions and commands", "Where the figures come from, so that they can be made again.")
    records = [(run.name, run.facts) for run in evidence.runs if run.facts] + evidence.benchmarks
    rows = [
        (name, _machine(record.get("machine")), ", ".join(f"{k} {v}" for k, v in _mapping(record, "versions").items()))
        for name, record in records
    ]
    if rows:
        section.tables.append(Table(("figures", "machine", "versions"), rows))
    section.code = [_command(name, record) for name, record in records] + [f"# this report\n{command}"]
    peaks = [
        (name, f"{record['peak_flops'] / 1e12:.3g} TFLOP/s", str(record.get("peak_source")))
        for name, record in evidence.benchmarks
        if record.get("peak_flops")
    ]
    if peaks:
        section.tables.append(Table(("benchmark", "peak of one device", "where it comes from"), peaks))
    section.absent += [
        f"run {run.name} has no run.json: its command is not known" for run in evidence.runs if not run.facts
    ]
    gpus = [name for name, record in records if _mapping(record, "machine").get("gpus")]
    if not gpus:
        section.absent.append("nothing here was measured on a GPU")
    return section


def _command(name: str, record: dict[str, Any]) -> str:
    processes = record.get("world_size")
    several = f", {processes} processes under tools/launch.py" if processes and processes > 1 else ""
    return f"# {name}{several}\n{record.get('command', 'not known')}"


def _mapping(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _machine(facts: Any) -> str:
    if not isinstance(facts, dict):
        return "not known"
    gpus = ", ".join(facts.get("gpus") or []) or "no GPU"
    load = " to ".join(str(facts[k]) for k in ("load_average", "load_average_at_end") if k in facts)
    return f"{facts.get('processor')}, {facts.get('cores')} cores, {gpus}, load {load}"


def _draw(section: Section, title: str, caption: str, x: Axis, y: Axis, series: list[Series]) -> None:
    try:
        section.charts.append(line_chart(title, caption, x, y, series))
    except ValueError:
        section.absent.append(f"{title}: nothing to draw")


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without rows that another sweep has measured already, which have the same times to the last digit."""
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["median_s"], row["spread"]), row)
    return list(found.values())


def _row_name(row: dict[str, Any]) -> str:
    processes = f", {row['processes']} ranks" if row["processes"] > 1 and "process" not in row["name"] else ""
    return f"{row['sweep']}: {row['name']}{processes}" if row["sweep"] != "variants" else f"{row['name']}{processes}"


def _scaled(evidence: Evidence) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(sweep, benchmark, rows) of everything that was measured over numbers of ranks."""
    return [(sweep, name, rows) for sweep in ("strong", "weak") for name, rows in evidence.measured(sweep)]


def _processes(count: int | None) -> str:
    return "processes not known" if count is None else "1 process" if count == 1 else f"{count} processes"


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{row['median_s'] * 1e3:,.0f}"


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
