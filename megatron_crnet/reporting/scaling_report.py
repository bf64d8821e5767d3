"""What a report says: sections with pictures and tables, from whatever inputs there are.

The figures that most people look for come first, those that say where all others come from last. A section that
nothing fills is left out; one line at the end names the tools that would fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.reporting.inputs import Benchmark, Figures, Machine, Record, ReportInputs, Row, Run
from megatron_crnet.reporting.page import Section, Table
from megatron_crnet.reporting.pictures import Bars, Lines, Series
from megatron_crnet.reporting.steps import GIB, MIB, bytes_unit, memory_bars, steps_section

TEXT_ONLY = 99
WHOLE = "MFU, whole attention"
MFU = (
    "MFU is the share of the devices' peak that the model's operations are, recomputation left out, and of attention "
    "only the half that the causal mask leaves; beside it with attention whole, as PaLM, torchtitan and nanochat count."
)


def build_sections(inputs: ReportInputs, peak_flops: float | None, command: str) -> list[Section]:
    """All sections that have something to say.

    Args:
        peak_flops: of one device, for the MFU of runs; benchmarks bring their own.
        command: that makes this report.
    """
    sections = [
        runs_section(inputs, peak_flops),
        _loss(inputs),
        _speed(inputs, peak_flops),
        _rows(inputs),
        steps_section(inputs),
        _memory(inputs),
        _traffic(inputs),
    ]
    return [section for section in sections if not section.is_empty] + [_sources(inputs, command)]


def runs_section(inputs: ReportInputs, peak_flops: float | None) -> Section:
    """A headline row for each run, and for each sweep of a benchmark."""
    text = "Runs of different length or data cannot be compared by their loss."
    section = Section("In short", f"{text} {MFU}" if inputs.runs and peak_flops else text)
    if inputs.runs:
        section.tables.append(Table([run_row(run, peak_flops) for run in inputs.runs], text=2))
    rows = []
    for name, benchmark in inputs.benchmarks.items():
        for sweep in dict.fromkeys(row.sweep for row in benchmark.rows):
            found = benchmark.of(sweep)
            fast, small = max(found, key=lambda row: row.speed_of_first), min(found, key=lambda row: row.peak_bytes)
            rows.append(
                {
                    "benchmark": name,
                    "sweep": sweep,
                    "fastest row": fast.name,
                    "smallest row": small.name,
                    "tokens/s": f"{fast.tokens_per_s:,.0f}",
                    "speed of first": f"{fast.speed_of_first:.2f}",
                    "peak memory, MiB": f"{small.peak_bytes / MIB:,.1f}",
                }
            )
    if rows:
        section.tables.append(
            Table(rows, text=4, title="Measured side by side: fastest and smallest row of each sweep")
        )
    return section


def run_row(run: Run, peak_flops: float | None = None) -> dict[str, str]:
    """The figures of a run that most people look for."""
    config, rate = run.config, run.median("tflops_per_device")
    share = rate * 1e12 / peak_flops if rate and peak_flops else None
    whole = share * growth if share and (growth := _whole_attention(run)) else None
    return {
        "run": run.name,
        "variant": config.model.variant if config else "-",
        "validation loss": _show(run.last("validation_loss"), "{:.4f}"),
        "perplexity": _show(run.last("validation_perplexity"), "{:,.2f}"),
        "training loss": _show(run.last("loss"), "{:.4f}"),
        "tokens/s": _show(run.median("tokens_per_s"), "{:,.0f}"),
        **({"MFU": _show(share, "{:.1%}"), WHOLE: _show(whole, "{:.1%}")} if peak_flops else {}),
        "tokens": _show(run.last("tokens"), "{:,.0f}"),
        "steps": _show(run.last("step"), "{:,.0f}"),
        "parameters": f"{total_parameters(config.model) / 1e6:,.2f}M" if config else "-",
        "lr": f"{config.optimizer.lr:g}" if config else "-",
        "ranks": _show(run.processes, "{}"),
    }


def _whole_attention(run: Run) -> float | None:
    """By how much a run's operations grow if attention is counted whole; None where they hang on documents' lengths."""
    if run.config is None or run.config.data.reset_attention_mask:
        return None
    model, length = run.config.model, run.config.training.seq_length
    return flops_per_token(model, length, whole_attention=True) / flops_per_token(model, length)


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _loss(inputs: ReportInputs) -> Section:
    section = Section(
        "Loss",
        "Nats per token; lower is better. Solid lines are training loss, means since the last line, single marks "
        "joined by thin lines are validation loss. The same runs twice: over tokens, where only the method counts, "
        "and over time, where speed counts as well.",
    )
    for title, x, over in (
        ("Loss over tokens", "tokens", "tokens"),
        ("Loss over time", "seconds of training", "seconds"),
    ):
        series = []
        for i, run in enumerate(inputs.runs):
            series.append(Series(run.name, run.points("loss", over), i, marks=False))
            if valid := run.points("validation_loss", over):
                series.append(Series(f"{run.name}, validation", valid, i, thin=True))
        if series:
            caption = "A line below another has learnt more by then."
            section.pictures.append(Lines(title, caption, x, "loss, nats per token", series))
    return section


def _scaled(inputs: ReportInputs) -> Iterator[tuple[str, str, list[Row]]]:
    """(sweep, benchmark, rows) of everything that was measured over numbers of ranks."""
    for sweep in ("strong", "weak"):
        for name, benchmark in inputs.benchmarks.items():
            if rows := benchmark.of(sweep):
                yield sweep, name, rows


def _speed(inputs: ReportInputs, peak_flops: float | None) -> Section:
    section = Section(
        "Speed by number of ranks",
        "Tokens per second of the whole run, speed-up in units of the smallest world (medians of ratios within "
        "repeats, which hold on a busy machine as well), and efficiency: speed-up over ranks. "
        f"{MFU} Strong scaling keeps the global batch, weak scaling grows it with the ranks. Both axes are "
        "logarithmic, so that ideal scaling is a straight line. Runs were not measured side by side: on a shared "
        "machine believe the benchmark's figures and not theirs.",
    )
    runs = [(run.processes, run.median("tokens_per_s"), run.median("tflops_per_device")) for run in inputs.runs]
    of_runs = sorted((n, speed) for n, speed, _ in runs if n and speed)
    scaled = [*_scaled(inputs)]
    if not scaled and len({n for n, _ in of_runs}) < 2:
        return section
    series = [Series("runs", of_runs, line=False)] if of_runs else []
    series += [
        Series(f"{name}, {sweep}", sorted((row.processes, row.tokens_per_s) for row in rows), i)
        for i, (sweep, name, rows) in enumerate(scaled, 1)
    ]
    section.pictures.append(_by_ranks("Tokens per second", "tokens/s", series))
    ups = [
        Series(f"{name}, {sweep}", sorted((row.processes, row.speed_of_first) for row in rows), i)
        for i, (sweep, name, rows) in enumerate(scaled, 1)
    ]
    if ups:
        section.pictures.append(_by_ranks("Speed-up", "speed of the smallest world", ups))
    shares = [
        Series(f"{name}, {sweep}", sorted((r.processes, 100 * r.mfu) for r in rows if r.mfu is not None), i)
        for i, (sweep, name, rows) in enumerate(scaled, 1)
    ]
    if peak_flops:
        found = sorted((n, 1e14 * rate / peak_flops) for n, _, rate in runs if n and rate)
        shares.insert(0, Series("runs", found, line=False))
    if any(s.points for s in shares):
        caption = "Level is ideal: each device does as much as it did alone."
        section.pictures.append(
            Lines("Model FLOPs utilization", caption, "ranks", "MFU, percent (causal half of attention)", shares, True)
        )
    section.tables += [_scaling_table(sweep, name, rows) for sweep, name, rows in scaled]
    return section


def _by_ranks(title: str, y: str, series: Sequence[Series]) -> Lines:
    start = next(s for s in [*series[1:], *series] if s.points).points[0]
    seen = sorted({n for s in series for n, _ in s.points})
    ideal = Series("ideal", [(n, start[1] * n / start[0]) for n in seen], faint=True)
    caption = "The gap to the ideal line is what communication, and sharing cores, cost."
    return Lines(title, caption, "ranks", y, [*series, ideal], logarithmic=True)


def _scaling_table(sweep: str, name: str, rows: list[Row]) -> Table:
    found = [
        {
            "ranks": str(row.processes),
            "tokens/step": f"{row.tokens_per_step:,.0f}",
            "ms/step": f"{row.median_s * 1e3:,.0f}",
            "spread": f"{row.spread:.0%}",
            "tokens/s": f"{row.tokens_per_s:,.0f}",
            "speed-up": f"{row.speed_of_first:.2f}",
            "efficiency": f"{row.speed_of_first * rows[0].processes / row.processes:.0%}",
            "MFU": _show(row.mfu, "{:.1%}"),
            WHOLE: _show(row.mfu_whole_attention, "{:.1%}"),
        }
        for row in rows
    ]
    return Table(found, text=0, title=f"{sweep.capitalize()} scaling, {name}")


SWEEPS = {
    "variants": "Variants",
    "ranks": "Ranks r",
    "recompute": "Recomputation",
    "layouts": "Layouts",
    "rows": "Rows of the command line",
}


def _rows(inputs: ReportInputs) -> Section:
    section = Section(
        "Variants, layouts, recomputation",
        "Speed and activations in units of the first row of each sweep, by the clock and by CPU time.",
    )
    for sweep, title in SWEEPS.items():
        for name, benchmark in inputs.benchmarks.items():
            if rows := benchmark.of(sweep):
                section.tables.append(Table([_row(row, rows[0]) for row in rows], title=f"{title}, {name}"))
            if rows and sweep == "recompute":
                points = [(row.name, row.peak_bytes / MIB, 1 / row.speed_of_first) for row in rows]
                axes = "peak memory, MiB", f"time, in units of {rows[0].name}"
                section.pictures.append(_marks(f"Memory against time, {name}", *axes, points))
    for name, record in inputs.recompute.items():
        counted = [(row.name, row.peak / MIB, row.flops / 1e9) for row in record.rows]
        axes = "kept and transient, MiB", "GFLOP, forward and backward"
        section.pictures.append(_marks(f"Memory against operations, counted, {name}", *axes, counted))
        rows_of = [
            {
                "strategy": row.name,
                "kept, MiB": f"{row.kept / MIB:,.1f}",
                "peak, MiB": f"{row.peak / MIB:,.1f}",
                "GFLOP": f"{row.flops / 1e9:,.1f}",
            }
            for row in record.rows
        ]
        section.tables.append(Table(rows_of, title=f"Recomputation, counted on the layers alone, {name}"))
    return section


def _row(row: Row, first: Row) -> dict[str, str]:
    return {
        "row": row.name,
        "ranks": str(row.processes),
        "parameters": f"{row.parameters / 1e6:,.2f}M",
        "FLOPs/token": f"{row.flops_per_token / 1e6:,.1f}M",
        "ms/step": f"{row.median_s * 1e3:,.0f}",
        "spread": f"{row.spread:.0%}",
        "speed": f"{row.speed_of_first:.2f}",
        "by CPU time": f"{row.cpu_speed_of_first:.2f}",
        "peak memory, MiB": f"{row.peak_bytes / MIB:,.1f}",
        "activations, of first": _show(
            row.memory.activations / first.memory.activations if first.memory.activations else None, "{:.2f}"
        ),
    }


def _marks(title: str, x: str, y: str, points: list[tuple[str, float, float]]) -> Lines:
    series = [Series(name, [(a, b)], i, line=False) for i, (name, a, b) in enumerate(points)]
    return Lines(title, "Each mark is a strategy; left and low is better.", x, y, series)


def _figures(inputs: ReportInputs) -> list[tuple[str, Figures]]:
    """Of estimates and simulations, by name."""
    found = []
    for name, estimate in inputs.estimates.items():
        several = len(estimate.stages) > 1
        found += [(f"{name}, stage {i}" if several else name, figures) for i, figures in enumerate(estimate.stages)]
    for name, simulation in inputs.simulations.items():
        found.append((f"{name}, counted", simulation.counted))
        found += [(f"{name}, estimated", simulation.estimated)] if simulation.estimated else []
    return found


def _memory(inputs: ReportInputs) -> Section:
    section = Section(
        "Memory by part",
        "Bytes at the peak of a step on the fullest rank: a benchmark counts them (on CPUs bytes of tensors that are "
        "alive, on GPUs the allocator's), estimates and simulations come from their own tools.",
    )
    groups = {
        f"Measured, {name}": [(row.label, row.memory) for row in benchmark.distinct()]
        for name, benchmark in inputs.benchmarks.items()
    }
    figures = [(name, f.memory.parts) for name, f in _figures(inputs)]
    groups["Estimated and simulated"] = [(n, m) for n, m in figures if m.total < 10 * GIB]
    groups["Estimated and simulated, large"] = [(n, m) for n, m in figures if m.total >= 10 * GIB]
    for title, found in groups.items():
        if not found:
            continue
        bars = memory_bars(f"Memory, {title[0].lower()}{title[1:]}", "A bar is a rank.", *zip(*found, strict=True))
        section.pictures.append(bars)
        section.tables.append(_size_table(bars))
    return section


def _size_table(bars: Bars) -> Table:
    rows = [
        {
            "row": name,
            **{f"{part}, {bars.unit}": f"{sizes[i]:,.2f}" for part, sizes in bars.parts},
            f"all, {bars.unit}": f"{sum(sizes[i] for _, sizes in bars.parts):,.2f}",
        }
        for i, name in enumerate(bars.rows)
    ]
    return Table(rows, title=bars.title)


def _traffic(inputs: ReportInputs) -> Section:
    section = Section(
        "Traffic by kind",
        "Bytes of a step by group of ranks and kind of call. A benchmark's rows count all ranks together, estimates "
        "and simulations one rank. The volume of an all-gather is its output, of a reduce-scatter its input, an "
        "all-reduce counts as both.",
    )
    groups = {
        f"Traffic, counted, {name}": [
            (row.label, row.traffic) for row in benchmark.distinct() if any(row.traffic.values())
        ]
        for name, benchmark in inputs.benchmarks.items()
    }
    figures = [(name, f.traffic()) for name, f in _figures(inputs)]
    sizes = {name: sum(traffic.values()) for name, traffic in figures}
    groups["Traffic of a rank, estimated and simulated"] = [f for f in figures if 0 < sizes[f[0]] < 10 * GIB]
    groups["Traffic of a rank, estimated and simulated, large"] = [f for f in figures if sizes[f[0]] >= 10 * GIB]
    for title, found in groups.items():
        if not found:
            continue
        unit, size = bytes_unit([sum(traffic.values()) for _, traffic in found])
        kinds = sorted({kind for _, traffic in found for kind in traffic})
        parts = [(kind, [traffic.get(kind, 0) / size for _, traffic in found]) for kind in kinds]
        bars = Bars(title, "A bar is one step.", unit, [name for name, _ in found], parts)
        section.pictures.append(bars)
        section.tables.append(_size_table(bars))
    return section


def _sources(inputs: ReportInputs, command: str) -> Section:
    section = Section(
        "Where these figures come from",
        "Everything that was read, with its machine, versions and command, so that it can be made again.",
    )
    records = [*inputs.records()]
    rows = [
        {
            "figures": name,
            "what": _what(record, inputs, name),
            "machine": _machine(record.machine),
            "versions": ", ".join(f"{k} {v}" for k, v in (record.versions or {}).items()) or "-",
        }
        for name, record in records
    ]
    section.tables.append(Table(rows, text=TEXT_ONLY))
    peaks = [
        {
            "benchmark": name,
            "where it comes from": b.peak_source or "-",
            "peak per device": f"{b.peak_flops / 1e12:.3g} TFLOP/s",
        }
        for name, b in inputs.benchmarks.items()
        if b.peak_flops
    ]
    section.tables += [Table(peaks, text=2)] if peaks else []
    section.code = [_command(name, record) for name, record in records] + [f"# this report\n{command}"]
    section.notes = [f"left out: {problem}" for problem in inputs.say()]
    if absent := _absent(inputs, records):
        section.notes.append(f"Not in this report: {'; '.join(absent)}.")
    return section


def _what(record: Record, inputs: ReportInputs, name: str) -> str:
    if isinstance(record, Benchmark):
        whole = "" if record.complete else ", stopped before its end"
        on = "a CPU: ratios count, absolute figures are a small machine's" if record.device == "cpu" else record.device
        return f"benchmark, {len(record.rows)} measured rows on {on}{whole}"
    if record.step is not None:
        return f"{record.kind} of {record.step.line}"
    for run in inputs.runs:
        if run.facts is record and run.name == name:
            count = "processes not known" if run.processes is None else "1 process" if run.processes == 1 else ""
            return f"run, {len(run.lines)} lines, {count or f'{run.processes} processes'}"
    return str(record.kind or "estimate or simulation")


def _machine(machine: Machine | None) -> str:
    if machine is None:
        return "not known"
    if machine.peak_flops:  # of an estimate
        return f"for {machine.name}, by data sheet or file; runs anywhere"
    load = " to ".join(f"{v:g}" for v in (machine.load_average, machine.load_average_at_end) if v is not None)
    gpus = ", ".join(machine.gpus or []) or "no GPU"
    return f"{machine.processor or 'unknown processor'}, {machine.cores or '?'} cores, {gpus}, load {load or '?'}"


def _command(name: str, record: Record) -> str:
    processes = record.world_size if record.kind == "run" else None
    several = f", {processes} processes under tools/launch.py" if processes and processes > 1 else ""
    return f"# {name}{several}\n{record.command or 'not known'}"


def _absent(inputs: ReportInputs, records: list[tuple[str, Record]]) -> list[str]:
    """What would be here if somebody had made it, and how."""
    sweeps = {row.sweep for benchmark in inputs.benchmarks.values() for row in benchmark.rows}
    missing = [sweep for sweep in ("strong", "weak", "variants", "layouts", "recompute") if sweep not in sweeps]
    found = []
    if missing:
        found.append("benchmarks (python tools/benchmark.py " + " ".join(f"--sweep {name}" for name in missing) + ")")
    if not inputs.runs:
        found.append("runs (their folders)")
    elif all(run.last("validation_loss") is None for run in inputs.runs):
        found.append("validation loss (training.eval_steps above 0)")
    if not (inputs.estimates or inputs.simulations):
        found.append("estimates and simulations (tools/estimate.py, tools/simulate.py, --json)")
    if not any(record.machine and record.machine.gpus for _, record in records):
        found.append("anything measured on a GPU")
    return found
