"""The sections of a report, with pictures and tables.

Headline figures come first, their origins last. A section without content is left out; one line at the end names the
commands that would fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.planning.machines import machine_of_gpu
from megatron_crnet.reporting.inputs import MEASURED, SAME, ReportInputs, Run
from megatron_crnet.reporting.observation import observation_section
from megatron_crnet.reporting.page import Section, Table
from megatron_crnet.reporting.pictures import Lines, Series
from megatron_crnet.reporting.records import KINDS, Row
from megatron_crnet.reporting.steps import GIB, MIB, PARTS, bars_of, steps_section, unit_of

TEXT_ONLY = 99
PROFILED = 15
"""Kernels of a profile that are listed."""
WHOLE = "MFU, whole attention"
MFU = (
    "MFU is the share of the devices' peak that the model's operations are, recomputation left out, and of attention "
    "only the half that the causal mask leaves; beside it with attention whole, as PaLM, torchtitan and nanochat count."
)
COLUMNS: dict[str, tuple[str, float | None, str]] = {
    "row": ("name", None, "{}"),
    "ranks": ("processes", None, "{}"),
    "tokens/step": ("tokens_per_step", None, "{:,.0f}"),
    "parameters": ("parameters", 1e6, "{:,.2f}M"),
    "FLOPs/token": ("flops_per_token", 1e6, "{:,.1f}M"),
    "ms/step": ("median_s", 1e-3, "{:,.0f}"),
    "spread": ("spread", None, "{:.0%}"),
    "tokens/s": ("tokens_per_s", None, "{:,.0f}"),
    "speed": ("speed_of_first", None, "{:.2f}"),
    "by CPU time": ("cpu_speed_of_first", None, "{:.2f}"),
    "efficiency": ("efficiency", None, "{:.0%}"),
    "MFU": ("mfu", None, "{:.1%}"),
    WHOLE: ("mfu_whole_attention", None, "{:.1%}"),
    "peak memory, MiB": ("peak_bytes", MIB, "{:,.1f}"),
    "activations, of first": ("share", None, "{:.2f}"),
}
"""Figures of a benchmark's row, how they are called: key, unit and form."""
SWEEPS = {
    "variants": "Variants",
    "ranks": "Ranks r",
    "recompute": "Recomputation",
    "layouts": "Layouts",
    "rows": "Rows of the command line",
}


def build_sections(inputs: ReportInputs, peak_flops: float | None, command: str) -> list[Section]:
    """All sections that have content.

    Args:
        peak_flops: of one device, for the MFU of runs; None takes the data sheet of each run's GPU, if that is known.
            Benchmarks bring their own.
        command: that makes this report.
    """
    rows = pd.DataFrame(inputs.rows, columns=[*Row.model_fields, *PARTS, "benchmark", "label"])
    once = rows[~rows.duplicated(["benchmark", *SAME])]
    profiles = pd.DataFrame(inputs.profiles, columns=["way", "label", *PARTS, "traffic"])
    profiles = profiles[profiles["way"] != MEASURED]
    sections = [
        _headlines(inputs, rows, peak_flops),
        _loss(inputs),
        observation_section(inputs.of_kind("observation")),
        _speed(inputs, rows, peak_flops),
        _sweeps(rows),
        steps_section(inputs),
        _profiles(inputs),
        _memory(once, profiles),
        _traffic(once, profiles),
    ]
    return [section for section in sections if not section.is_empty] + [_origins(inputs, rows, command)]


def _by_sweep(rows: pd.DataFrame, sweeps: Sequence[str]) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(sweep, benchmark, rows) in the order of `sweeps`."""
    for sweep in sweeps:
        for name, found in rows[rows["sweep"] == sweep].groupby("benchmark", sort=False):
            yield sweep, name, found


def row_cells(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """These `COLUMNS` of rows of benchmarks as text; - where nothing is known."""
    cells = {}
    for name in names:
        key, unit, form = COLUMNS[name]
        values = rows[key] if key in rows else [None] * len(rows)
        cells[name] = [_cell(value / unit if unit and value is not None else value, form) for value in values]
    return pd.DataFrame(cells)


def _cell(value: Any, form: str) -> str:
    return "-" if pd.isna(value) else form.format(value)


def _headlines(inputs: ReportInputs, rows: pd.DataFrame, peak_flops: float | None) -> Section:
    """A row per run, and per sweep of a benchmark."""
    text = "Runs of different length or data cannot be compared by their loss."
    peaks = [_peak(run, peak_flops) for run in inputs.runs]
    section = Section("In short", f"{text} {MFU}" if any(peak for peak, _ in peaks) else text)
    if inputs.runs:
        known = any(peak for peak, _ in peaks)
        cells = [run_row(run, peak if known else None) for run, (peak, _) in zip(inputs.runs, peaks, strict=True)]
        section.tables.append(Table(cells, text=2))
    named = [(run.name, *peak) for run, peak in zip(inputs.runs, peaks, strict=True)]
    named += [(r["name"], r["peak_flops"], r["peak_source"] or "?") for r in inputs.of_kind("benchmark")]
    section.notes = [
        f"MFU of {name}: of {peak / 1e12:.3g} TFLOP/s per device ({of})" for name, peak, of in named if peak
    ]
    if len(rows):
        groups = rows.groupby(["benchmark", "sweep"], sort=False)
        fast = rows.loc[groups["speed_of_first"].idxmax()].reset_index(drop=True)
        small = rows.loc[groups["peak_bytes"].idxmin()].reset_index(drop=True)
        names = fast[["benchmark", "sweep", "name"]].assign(small=small["name"])
        names.columns = pd.Index(["benchmark", "sweep", "fastest row", "smallest row"])
        cells = pd.concat(
            [names, row_cells(fast, ("tokens/s", "speed")), row_cells(small, ("peak memory, MiB",))], axis=1
        )
        section.tables.append(Table(cells, 4, "Measured side by side: fastest and smallest row of each sweep"))
    return section


def _peak(run: Run, given: float | None) -> tuple[float, str]:
    """Operations per second of one device of a run, and where that is from; 0 where it is unknown."""
    gpus = (run.facts["machine"] or {}).get("gpus") or [""]
    card, dtype = machine_of_gpu(gpus[0]), run.config.training.dtype if run.config else "bf16"
    if given is not None:
        return given, "--peak-tflops"
    return (card.peak(dtype), f"data sheet of {card.name}, {dtype}") if card else (0.0, "")


def run_row(run: Run, peak_flops: float | None = None) -> dict[str, str]:
    """The headline figures of a run; with MFU where `peak_flops` is given, 0 for an unknown one."""
    config, rates = run.config, (run.median("tflops_per_device"), _whole_attention(run))
    share, whole = (rate * 1e12 / peak_flops if rate and peak_flops else None for rate in rates)
    return {
        "run": run.name,
        "variant": config.model.variant if config else "-",
        "validation loss": _cell(run.last("validation_loss"), "{:.4f}"),
        "perplexity": _cell(run.last("validation_perplexity"), "{:,.2f}"),
        "training loss": _cell(run.last("loss"), "{:.4f}"),
        "tokens/s": _cell(run.median("tokens_per_s"), "{:,.0f}"),
        **({"MFU": _cell(share, "{:.1%}"), WHOLE: _cell(whole, "{:.1%}")} if peak_flops is not None else {}),
        "tokens": _cell(run.last("tokens"), "{:,.0f}"),
        "steps": _cell(run.last("step"), "{:,.0f}"),
        "parameters": f"{total_parameters(config.model) / 1e6:,.2f}M" if config else "-",
        "lr": f"{config.optimizer.lr:g}" if config else "-",
        "ranks": _cell(run.processes, "{}"),
    }


def _whole_attention(run: Run) -> float | None:
    """`tflops_per_device` with attention whole; of older runs None where it depends on the lengths of documents."""
    rate, whole = run.median("tflops_per_device"), run.median("tflops_per_device_whole_attention")
    if whole or not rate or run.config is None or run.config.data.reset_attention_mask:
        return whole
    model, length = run.config.model, run.config.training.seq_length
    return rate * flops_per_token(model, length, whole_attention=True) / flops_per_token(model, length)


def _loss(inputs: ReportInputs) -> Section:
    section = Section(
        "Loss",
        "Nats per token; lower is better. Solid lines are training loss, means since the last line, single marks "
        "joined by thin lines are validation loss. The same runs twice: over tokens, where only the method counts, "
        "and over time, where speed counts as well.",
    )
    for title, x, over in (("tokens", "tokens", "tokens"), ("time", "seconds of training", "seconds")):
        series = []
        for i, run in enumerate(inputs.runs):
            series.append(Series(run.name, run.points("loss", over), i, "unmarked"))
            if valid := run.points("validation_loss", over):
                series.append(Series(f"{run.name}, validation", valid, i, "thin"))
        if series:
            caption = "A line below another has learnt more by then."
            section.pictures.append(Lines(f"Loss over {title}", caption, x, "loss, nats per token", series))
    return section


def _speed(inputs: ReportInputs, rows: pd.DataFrame, peak_flops: float | None) -> Section:
    section = Section(
        "Speed by number of ranks",
        "Tokens per second of the whole run, speed-up in units of the fewest ranks (medians of ratios within "
        "repeats, which hold on a busy machine as well), and efficiency: speed-up over ranks. "
        f"{MFU} Strong scaling keeps the global batch, weak scaling grows it with the ranks. Both axes are "
        "logarithmic, so that ideal scaling is a straight line. Runs were not measured side by side: on a shared "
        "machine believe the benchmark's figures and not theirs.",
    )
    rates = [(run.processes, run.median("tokens_per_s"), run.median("tflops_per_device")) for run in inputs.runs]
    runs = pd.DataFrame(rates, columns=["processes", "tokens_per_s", "mfu"], dtype=float)
    runs["mfu"] *= [1e12 / peak if (peak := _peak(run, peak_flops)[0]) else float("nan") for run in inputs.runs]
    scaled = [*_by_sweep(rows, ("strong", "weak"))]
    if not scaled and runs.dropna(subset=["processes", "tokens_per_s"])["processes"].nunique() < 2:
        return section
    for column, title, y in (
        ("tokens_per_s", "Tokens per second", "tokens/s"),
        ("speed_of_first", "Speed-up", "speed of the fewest ranks"),
        ("mfu", "Model FLOPs utilization", "MFU, percent"),
    ):
        size = 100 if column == "mfu" else 1
        series = [
            Series(f"{name}, {sweep}", _points(found, column, size), i)
            for i, (sweep, name, found) in enumerate(scaled, 1)
        ]
        series += [Series("runs", _points(runs, column, size), kind="marks")] if column in runs else []
        series = [one for one in series if one.points]
        if series:
            caption = "With the causal half of attention. Level is ideal: each device does as much as it did alone."
            if column != "mfu":
                caption = "The gap to the ideal line is what communication, and sharing cores, cost."
                ranks, speed = series[0].points[0]
                seen = sorted({n for one in series for n, _ in one.points})
                series.append(Series("ideal", [(n, speed * n / ranks) for n in seen], kind="ideal"))
            section.pictures.append(Lines(title, caption, "ranks", y, series, logarithmic=True))
    names = ("ranks", "tokens/step", "ms/step", "spread", "tokens/s", "speed", "efficiency", "MFU", WHOLE)
    for sweep, name, found in scaled:
        known = found.assign(efficiency=found["speed_of_first"] * found["processes"].iloc[0] / found["processes"])
        section.tables.append(Table(row_cells(known, names), text=0, title=f"{sweep.capitalize()} scaling, {name}"))
    return section


def _points(rows: pd.DataFrame, column: str, size: float) -> list[tuple[float, float]]:
    """(ranks, value) of the rows that have both."""
    known = rows[["processes", column]].dropna().astype(float).sort_values("processes")
    return [*zip(known["processes"], known[column] * size, strict=True)]


def _sweeps(rows: pd.DataFrame) -> Section:
    section = Section(
        "Variants, layouts, recomputation",
        "Speed and activations in units of the first row of each sweep, by the clock and by CPU time.",
    )
    names = ("row", "ranks", "parameters", "FLOPs/token", "ms/step", "spread", "speed", "by CPU time")
    for sweep, name, found in _by_sweep(rows, [*SWEEPS]):
        known = found.assign(share=found["activations"] / (found["activations"].iloc[0] or float("nan")))
        cells = row_cells(known, (*names, "peak memory, MiB", "activations, of first"))
        section.tables.append(Table(cells, title=f"{SWEEPS[sweep]}, {name}"))
        if sweep == "recompute":
            points = zip(found["name"], found["peak_bytes"] / MIB, 1 / found["speed_of_first"], strict=True)
            series = [Series(name, [(a, b)], i, "marks") for i, (name, a, b) in enumerate(points)]
            caption, y = (
                "Each mark is a strategy; left and low is better.",
                f"time, in units of {found['name'].iloc[0]}",
            )
            section.pictures.append(Lines(f"Memory against time, {name}", caption, "peak memory, MiB", y, series))
    return section


def _profiles(inputs: ReportInputs) -> Section:
    """Two tables per profile: by kind, and the kernels that take the most time."""
    section = Section(
        "Where the time of a step goes",
        "Steps of rank 0 under logging.profile_steps, per step: kernels of a GPU, on CPUs operations without what they "
        "call. Products are those of matrices, host is Python and autograd, glue is the rest. Kernels may overlap, a "
        "profiled step takes longer than others, and work between steps of the range is included. The trace lies "
        "beside the run's profile.json.",
    )
    for record in inputs.of_kind("profile"):
        title = f"{record['name']}: {record['step_s'] * 1e3:,.1f} ms per step"
        for heading, key, names in ((title, "kinds", ["kind"]), (record["name"], "kernels", ["name", "kind"])):
            rows = pd.DataFrame(record[key], columns=[*names, "ms", "share", "launches"]).head(PROFILED)
            shown = {"ms": "{:,.2f}", "share": "{:.1%}", "launches": "{:,.0f}"}
            cells = {column: [_cell(value, form) for value in rows[column]] for column, form in shown.items()}
            table = rows.assign(**cells) if key == "kinds" else rows.assign(**cells).drop(columns="share")
            section.tables.append(
                Table(table.rename(columns={"ms": "ms per step", "launches": "launches per step"}), len(names), heading)
            )
    return section


def _memory(rows: pd.DataFrame, profiles: pd.DataFrame) -> Section:
    """A bar and a line per row, those of 10 GiB or more in a picture and a table of their own."""
    section = Section(
        "Memory by part",
        "Bytes at the peak of a step on the fullest rank: a benchmark counts them (on CPUs bytes of tensors that are "
        "alive, on GPUs the allocator's), estimates and simulations come from their own commands.",
    )
    for name, found in _with_profiles(rows, profiles):
        sizes = found.set_index("label")[[*PARTS]].rename(columns=PARTS).astype(float)
        large = sizes.sum(axis=1) >= 10 * GIB
        for title, part in ((f"Memory, {name}", sizes[~large]), (f"Memory, {name}, large", sizes[large])):
            if len(part):
                section.pictures.append(bars_of(title, "A bar is a rank.", part.loc[:, part.any()]))
                section.tables.append(_bytes_table(title, part))
    return section


def _traffic(rows: pd.DataFrame, profiles: pd.DataFrame) -> Section:
    section = Section(
        "Traffic by kind",
        "Bytes of a step by group of ranks and kind of call. A benchmark's rows count all ranks together, estimates "
        "and simulations one rank. The volume of an all-gather is its output, of a reduce-scatter its input, an "
        "all-reduce counts as both, and of an all-to-all what leaves the rank.",
    )
    for name, found in _with_profiles(rows, profiles):
        sizes = pd.DataFrame([traffic or {} for traffic in found["traffic"]], index=found["label"])
        sizes = sizes.sort_index(axis=1).fillna(0.0)
        if len(sent := sizes[sizes.any(axis=1)]):
            section.tables.append(_bytes_table(f"Traffic, {name}", sent))
    return section


def _with_profiles(rows: pd.DataFrame, profiles: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each benchmark, and what was not measured."""
    return [
        *((f"measured, {name}", found) for name, found in rows.groupby("benchmark", sort=False)),
        ("estimated and simulated", profiles),
    ]


def _bytes_table(title: str, sizes: pd.DataFrame) -> Table:
    unit, size = unit_of(sizes.sum(axis=1))
    shown = sizes.loc[:, sizes.any()].assign(all=sizes.sum(axis=1)).div(size).map("{:,.2f}".format)
    return Table(shown.add_suffix(f", {unit}").rename_axis("row").reset_index(), title=title)


def _origins(inputs: ReportInputs, rows: pd.DataFrame, command: str) -> Section:
    section = Section(
        "Where these figures come from",
        "Everything that was read, with its machine, versions and command, so that it can be made again.",
    )
    heads = [{**run.facts, "name": run.name, "run": run} for run in inputs.runs]
    heads += [record for kind in KINDS for record in inputs.of_kind(kind)]
    origins = [
        {
            "figures": head["name"],
            "what": _what(head),
            "machine": _machine(head["machine"]),
            "versions": ", ".join(f"{k} {v}" for k, v in (head["versions"] or {}).items()) or "-",
        }
        for head in heads
    ]
    section.tables.append(Table(origins, text=TEXT_ONLY))
    section.code = [f"# {head['name']}\n{head['command'] or 'unknown'}" for head in heads]
    section.code.append(f"# this report\n{command}")
    section.notes = [f"left out: {problem}" for problem in inputs.say()]
    if absent := _absent(inputs, rows, heads):
        section.notes.append(f"Not in this report: {'; '.join(absent)}.")
    return section


def _what(head: dict[str, Any]) -> str:
    if "run" in head:
        processes = head["run"].processes or "an unknown number of"
        return f"run, {len(head['run'].lines)} lines, {processes} process{'es' * (processes != 1)}"
    if head["kind"] == "benchmark":
        whole = "" if head["complete"] else ", stopped before its end"
        cpu = "a CPU: ratios count, absolute figures are a small machine's"
        device = cpu if head["device"] == "cpu" else head["device"]
        origin = f" ({head['peak_source']})" if head["peak_source"] else ""
        peak = f", peak {head['peak_flops'] / 1e12:.3g} TFLOP/s per device{origin}" if head["peak_flops"] else ""
        return f"benchmark, {len(head['rows'])} measured rows on {device}{whole}{peak}"
    return f"{head['kind']} of {head['step']['line']}" if head["step"] else str(head["kind"])


def _machine(machine: dict[str, Any] | None) -> str:
    if machine is None:
        return "unknown"
    if machine["peak_flops"]:  # of an estimate
        return f"for {machine['name']}, by data sheet or file; runs anywhere"
    load = " to ".join(f"{v:g}" for v in (machine["load_average"], machine["load_average_at_end"]) if v is not None)
    gpus, processor = ", ".join(machine["gpus"] or []) or "no GPU", machine["processor"] or "unknown processor"
    return f"{processor}, {machine['cores'] or '?'} cores, {gpus}, load {load or '?'}"


def _absent(inputs: ReportInputs, rows: pd.DataFrame, heads: list[dict[str, Any]]) -> list[str]:
    """What the inputs lack, with the command that makes it."""
    sweeps = {*rows["sweep"]}
    missing = [sweep for sweep in ("strong", "weak", "variants", "layouts", "recompute") if sweep not in sweeps]
    found = []
    if missing:
        found.append("benchmarks (crnet benchmark " + " ".join(f"--sweep {name}" for name in missing) + ")")
    if not inputs.runs:
        found.append("runs (their folders)")
    elif all(run.last("validation_loss") is None for run in inputs.runs):
        found.append("validation loss (training.eval_steps above 0)")
    if not inputs.of_kind("estimate", "simulation"):
        found.append("estimates and simulations (crnet estimate, crnet simulate, --json)")
    if not any(head["machine"] and head["machine"]["gpus"] for head in heads):
        found.append("anything measured on a GPU")
    return found
