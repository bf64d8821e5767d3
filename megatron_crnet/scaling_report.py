"""What a scaling report says: sections with pictures and tables, from whatever evidence there is."""

from __future__ import annotations

from typing import Any

from megatron_crnet.arithmetic import flops_per_token, total_parameters
from megatron_crnet.report_costs import memory_section, recompute_section, traffic_section
from megatron_crnet.report_inputs import Evidence, Run
from megatron_crnet.report_parts import BENCHMARK, MIB, Section, Table, count_processes
from megatron_crnet.report_side_by_side import side_by_side_section
from megatron_crnet.report_speed import layouts_section, loss_section, scaling_section, speed_section


def build_sections(evidence: Evidence, peak_flops: float | None, command: str) -> list[Section]:
    """All sections, also those that can only say what is absent.

    Args:
        peak_flops: of one device, for the MFU of runs; benchmarks bring their own.
        command: that makes this report.
    """
    return [
        _what_was_read(evidence),
        loss_section(evidence),
        speed_section(evidence, peak_flops),
        scaling_section(evidence, "strong", "the same global batch on more processes"),
        scaling_section(evidence, "weak", "a global batch that grows with the processes"),
        layouts_section(evidence),
        side_by_side_section(evidence),
        memory_section(evidence),
        recompute_section(evidence),
        traffic_section(evidence),
        _variants(evidence),
        _provenance(evidence, command),
    ]


def _what_was_read(evidence: Evidence) -> Section:
    section = Section("What this report is made from", "Everything that was read; what was not read is named below it.")
    rows = [("run", run.name, f"{len(run.lines)} lines, {count_processes(run.processes)}") for run in evidence.runs]
    for name, record in evidence.benchmarks:
        whole = "" if record.get("complete") else ", stopped before its end"
        device = record.get("device")
        on = "a CPU: its ratios count, its absolute figures are those of a small machine" if device == "cpu" else device
        rows.append(("benchmark", name, f"{len(record['rows'])} measured rows on {on}{whole}"))
    for name, record in evidence.records:
        line = _mapping(record, "step").get("line", "memory and traffic of a rank")
        rows.append((str(record.get("kind", "estimate or simulation")), name, str(line)))
    rows += [("recomputation", name, f"{len(found['rows'])} strategies, counted") for name, found in evidence.recompute]
    section.tables.append(Table(("kind", "name", "what"), rows))
    section.absent += evidence.problems
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
    records = [(run.name, run.facts) for run in evidence.runs if run.facts] + evidence.benchmarks + evidence.recompute
    records += [(name, record) for name, record in evidence.records if "command" in record]
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
    processes = record.get("world_size") if record.get("kind") == "run" else None
    several = f", {processes} processes under tools/launch.py" if isinstance(processes, int) and processes > 1 else ""
    return f"# {name}{several}\n{record.get('command', 'not known')}"


def _mapping(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _machine(facts: Any) -> str:
    if not isinstance(facts, dict):
        return "not known"
    if "peak_flops" in facts:  # of an estimate
        return f"for {facts.get('name')}, by data sheet or file; runs anywhere"
    gpus = ", ".join(facts.get("gpus") or []) or "no GPU"
    load = " to ".join(str(facts[k]) for k in ("load_average", "load_average_at_end") if k in facts)
    return f"{facts.get('processor')}, {facts.get('cores')} cores, {gpus}, load {load}"
