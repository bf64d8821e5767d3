"""The section that sets estimated, simulated and measured figures of one step beside each other.

Figures belong together where their files name the same step (`step_identity.py`). All are of one rank: a benchmark
holds those of every rank, an estimate those of every pipeline stage, a simulation those of the rank that it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_crnet.charts import stacked_bars
from megatron_crnet.report_costs import PARTS
from megatron_crnet.report_inputs import Evidence, are_numbers, bytes_by_kind, memory_parts
from megatron_crnet.report_parts import MIB, Section, Table, distinct, row_name
from megatron_crnet.step_identity import identify_step

ESTIMATED, SIMULATED, MEASURED = "estimated", "simulated", "measured"


@dataclass(frozen=True)
class Side:
    """What one source says of a rank's step.

    Attributes:
        way: estimated, simulated or measured.
        parts: bytes of memory by part, which add up to the peak; empty where nothing is known.
        operations: as PyTorch's counter counts them; None where they were not counted.
        traffic: bytes by group of ranks; None where they were not counted.
        seconds, tokens_per_s: of the whole run's step; None where no time is known.
        machine: that the time is of.
    """

    way: str
    source: str
    parts: dict[str, float]
    operations: float | None = None
    traffic: dict[str, float] | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    machine: str = ""

    @property
    def peak(self) -> float | None:
        """Bytes of memory."""
        return sum(self.parts.values()) or None


@dataclass(frozen=True)
class Source:
    """A file, a row or a run that names its step."""

    way: str
    name: str
    step: dict[str, str]
    record: dict[str, Any]
    machine: str = ""


def side_by_side_section(evidence: Evidence) -> Section:
    """A table and a picture for each rank's step that was found out in two ways at least."""
    section = Section(
        "Estimated, simulated, measured",
        "One step, found out by formulas (tools/estimate.py), by the real code on tensors without memory "
        "(tools/simulate.py) and in real steps (tools/benchmark.py, runs). Memory, operations and bytes are those of "
        "one rank: the one that was simulated, or else the fullest. Operations are matrix products and attention "
        "without its mask, recomputation included; bytes are volumes by group of ranks. Time and tokens a second are "
        "the whole run's. In brackets is the difference from the first measured figure, or where nothing was measured "
        "from the simulated one; a time is compared only where the estimate is for the device that was measured.",
    )
    sources, together = list(_sources(evidence, section)), False
    steps: dict[str, list[Source]] = {}
    for source in sources:
        steps.setdefault(source.step["fingerprint"], []).append(source)
    measured_first = sorted(steps.values(), key=lambda found: all(s.way != MEASURED for s in found))
    for same in measured_first:
        together |= _compare(section, same)
    if not together:
        section.absent.append(
            "no step was found out in two ways: give tools/estimate.py and tools/simulate.py the options of a "
            "benchmark's row, with --json, and their files to this report"
        )
    return section


def _sources(evidence: Evidence, section: Section) -> Iterator[Source]:
    """Everything that names its step; what does not is named in the section."""
    ways, nameless = {"estimate": ESTIMATED, "simulation": SIMULATED}, []
    for name, record in evidence.records:
        step, way = _step(record), ways.get(str(record.get("kind")))
        if step is None or way is None:
            nameless.append(name)
            continue
        yield Source(way, name, step, record, str(_mapping(record, "machine").get("name", "")))
    for name, record in evidence.benchmarks:
        named = [(row, step) for row in distinct(record["rows"]) if (step := _step(row)) is not None]
        if not named:
            nameless.append(name)
        for row, step in named:
            yield Source(MEASURED, f"{name}, {row_name(row)}", step, row, _device(record))
    for run in evidence.runs:
        seconds, speed = run.median("step_time_s"), run.median("tokens_per_s")
        if run.config is not None and run.processes and seconds and speed:
            figures = {"median_s": seconds, "tokens_per_s": speed}
            step = identify_step(run.config, run.processes)
            yield Source(MEASURED, f"run {run.name}", step, figures, _device(run.facts))
    if nameless:
        section.absent.append(f"made before files named their step, so in no pair: {', '.join(nameless)}")


def _step(record: dict[str, Any]) -> dict[str, str] | None:
    found = record.get("step")
    whole = isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("fingerprint", "line"))
    return found if whole else None


def _mapping(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _device(record: dict[str, Any]) -> str:
    machine = _mapping(record, "machine")
    gpus = machine.get("gpus")
    return str(gpus[0] if isinstance(gpus, list) and gpus else machine.get("processor", ""))


def _compare(section: Section, sources: list[Source]) -> bool:
    """Add what is known of one step. Returns whether there is a pair."""
    line, together = sources[0].step["line"], False
    for rank in _ranks(sources):
        sides = [side for way in (ESTIMATED, SIMULATED, MEASURED) for side in _sides(sources, way, rank)]
        if len({side.way for side in sides}) < 2:
            continue
        together = True
        section.tables.append(_table(f"{line}; rank {rank}", sides))
        _draw(section, line, rank, sides)
    if not together and any(source.way != MEASURED for source in sources):
        names = ", ".join(f"{source.name} ({source.way})" for source in sources)
        section.absent.append(f"nothing to compare with {names}: {line}")
    return together


def _ranks(sources: list[Source]) -> list[int]:
    """Those that were simulated, else the first of the stage that the estimate finds fullest, else the first."""
    simulated = {source.record.get("rank") for source in sources if source.way == SIMULATED}
    if found := sorted(rank for rank in simulated if isinstance(rank, int) and rank >= 0):
        return found
    for source in sources:
        stages = _stages(source.record) if source.way == ESTIMATED else []
        if stages:
            peaks = [sum(memory_parts(stage["memory"]).values()) for stage in stages]
            return [peaks.index(max(peaks)) * (source.record["world_size"] // len(stages))]
    return [0]


def _stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an estimate, by pipeline rank; none where any is damaged."""
    found, world = record.get("stages"), record.get("world_size")
    if not isinstance(found, list) or not isinstance(world, int) or not found or world % len(found):
        return []
    return found if all(isinstance(s, dict) and memory_parts(s.get("memory")) for s in found) else []


def _sides(sources: list[Source], way: str, rank: int) -> Iterator[Side]:
    """What all sources of one way say of a rank; the estimate inside of a simulation counts where there is no other."""
    found = [source for source in sources if source.way == way]
    for source in found:
        side = {ESTIMATED: _estimated, SIMULATED: _simulated, MEASURED: _measured}[way](source, rank)
        if side is not None:
            yield side
    if way == ESTIMATED and not found:
        for source in (s for s in sources if s.way == SIMULATED and s.record.get("rank") == rank):
            stage = _mapping(source.record, "estimated")
            if memory_parts(stage.get("memory")):
                yield _of_stage(source.name, stage)
                return


def _estimated(source: Source, rank: int) -> Side | None:
    stages, record = _stages(source.record), source.record
    if not stages or not 0 <= rank < record["world_size"]:
        return None
    stage = stages[rank // (record["world_size"] // len(stages))]
    return _of_stage(
        f"{source.name}, for {source.machine}",
        stage,
        _number(_mapping(record, "seconds"), "step"),
        _number(record, "tokens_per_second"),
        source.machine,
    )


def _of_stage(
    name: str, stage: dict[str, Any], seconds: float | None = None, speed: float | None = None, machine: str = ""
) -> Side:
    parts, counted = memory_parts(stage["memory"]), _mapping(stage, "operations")
    operations = (
        counted["passes"] + counted["recomputation"] if are_numbers(counted, "passes", "recomputation") else None
    )
    return Side(
        ESTIMATED, name, parts, operations, _by_group(bytes_by_kind(stage.get("flows"))), seconds, speed, machine
    )


def _simulated(source: Source, rank: int) -> Side | None:
    counted = _mapping(source.record, "counted")
    parts = memory_parts(counted.get("memory"))
    if source.record.get("rank") != rank or not parts:
        return None
    return Side(
        SIMULATED, source.name, parts, _number(counted, "flops"), _by_group(bytes_by_kind(counted.get("flows")))
    )


def _measured(source: Source, rank: int) -> Side | None:
    ranks = source.record.get("ranks")
    mine = ranks[rank] if isinstance(ranks, list) and rank < len(ranks) and isinstance(ranks[rank], dict) else {}
    memory, traffic = _mapping(mine, "memory"), _mapping(mine, "traffic")
    known = bool(mine) and are_numbers(memory, *PARTS) and are_numbers(traffic, *traffic)
    return Side(
        MEASURED,
        source.name,
        {part: memory[part] for part in PARTS} if known else {},
        _number(mine, "operations"),
        _by_group(traffic) if known else None,
        source.record["median_s"],
        source.record["tokens_per_s"],
        source.machine,
    )


def _number(record: dict[str, Any], key: str) -> float | None:
    return float(record[key]) if are_numbers(record, key) else None


def _by_group(kinds: dict[str, float]) -> dict[str, float]:
    """Bytes by kind and group, named `GROUP kind`, added up over kinds."""
    found: dict[str, float] = {}
    for name, size in kinds.items():
        group = name.rpartition(" ")[0]
        found[group] = found.get(group, 0) + size
    return found


def _table(title: str, sides: list[Side]) -> Table:
    memory = _unit([s.peak for s in sides], ("MiB", MIB), ("GiB", 2**30))
    operations = _unit([s.operations for s in sides], ("GFLOP", 1e9), ("TFLOP", 1e12))
    volume = _unit([v for s in sides for v in (s.traffic or {}).values()], ("MiB", MIB), ("GiB", 2**30))
    groups = sorted({group for s in sides for group in s.traffic or {}})
    columns = [_values(sides, f"peak memory of the rank, {memory[0]}", memory[1], [s.peak for s in sides])]
    columns.append(_values(sides, f"operations, {operations[0]}", operations[1], [s.operations for s in sides]))
    for group in groups:
        sent = [None if s.traffic is None else s.traffic.get(group, 0.0) for s in sides]
        columns.append(_values(sides, f"{group}, {volume[0]}", volume[1], sent))
    columns.append(_times(sides, "ms a step", 1e-3, [s.seconds for s in sides]))
    columns.append(_times(sides, "tokens/s", 1, [s.tokens_per_s for s in sides]))
    names = ["found out by", *(f"{s.way}: {s.source}" for s in sides)]
    header, *rows = zip(names, *columns, strict=True)
    return Table(header, rows, title)


def _values(sides: list[Side], name: str, unit: float, values: list[float | None]) -> list[str]:
    """A column: its name, and of each side the value beside the first that was measured, or else simulated."""
    known = [i for way in (MEASURED, SIMULATED) for i, s in enumerate(sides) if s.way == way and values[i] is not None]
    first = known[0] if known else None
    return [
        name,
        *(_cell(v, None if first is None or i == first else values[first], unit) for i, v in enumerate(values)),
    ]


def _times(sides: list[Side], name: str, unit: float, values: list[float | None]) -> list[str]:
    """The same of times, which are compared only between figures of one device."""
    first = next((i for i, s in enumerate(sides) if s.way == MEASURED), None)
    cells = []
    for i, (side, value) in enumerate(zip(sides, values, strict=True)):
        beside = first is not None and i != first and _same_device(side, sides[first])
        cells.append(_cell(value, values[first] if beside and first is not None else None, unit))
    return [name, *cells]


def _unit(values: list[float | None], small: tuple[str, float], large: tuple[str, float]) -> tuple[str, float]:
    return large if max((v or 0 for v in values), default=0) >= 10 * large[1] else small


def _cell(value: float | None, reference: float | None, unit: float) -> str:
    """A figure and how far it is from the one that it is compared with."""
    if value is None:
        return "-"
    shown = f"{value / unit:,.0f}" if value / unit >= 1e3 else f"{value / unit:,.2f}"
    if 0 < value / unit < 0.005:
        shown = "<0.01"  # the norm's few bytes
    if not reference:
        return shown
    return f"{shown} ({'equal' if value == reference else f'{value / reference - 1:+.1%}'})"


def _same_device(side: Side, measured: Side) -> bool:
    """Whether a time is of the device that was measured: `h100` is an NVIDIA H100 80GB HBM3."""
    if side.way == MEASURED:
        return side.machine == measured.machine
    name = side.machine.lower().partition("-")[0]
    return bool(name) and name in measured.machine.lower()


def _draw(section: Section, line: str, rank: int, sides: list[Side]) -> None:
    """Bars of memory by part; measured rows that hold the same are drawn once."""
    kept: list[Side] = []
    for side in sides:
        if side.parts and (side.way, side.parts) not in [(s.way, s.parts) for s in kept]:
            kept.append(side)
    ways = [s.way for s in kept]
    names = [s.way if ways.count(s.way) == 1 else f"{s.way}, {s.source}" for s in kept]
    unit, size = _unit([s.peak for s in kept], ("MiB", MIB), ("GiB", 2**30))
    parts = [(text, [s.parts[key] / size for s in kept]) for key, text in PARTS.items()]
    section.charts.append(stacked_bars(f"Peak memory of rank {rank}", line, unit, names, parts))
