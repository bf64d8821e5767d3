"""One step, estimated, simulated and measured: the section that sets the figures beside each other.

Figures belong together where their files name the same step (`reporting/step_identity.py`). All are of one rank: a
benchmark holds those of every rank, an estimate those of every pipeline stage, a simulation those of the rank that it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_crnet.reporting.inputs import Estimate, Figures, Machine, Memory, ReportInputs, Row, Simulation, Step
from megatron_crnet.reporting.page import Section, Table
from megatron_crnet.reporting.pictures import Bars
from megatron_crnet.reporting.step_identity import identify_step

ESTIMATED, SIMULATED, MEASURED = "estimated", "simulated", "measured"
MIB, GIB = 2.0**20, 2.0**30
PARTS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations, buffers and temporary",
}


@dataclass(frozen=True)
class Side:
    """What one source says of a rank's step; None where it does not know.

    Attributes:
        way: estimated, simulated or measured.
        operations: as PyTorch's counter counts them.
        traffic: bytes by group of ranks.
        seconds, tokens_per_s: of the whole run's step.
        device: that the time is of.
    """

    way: str
    source: str
    memory: Memory | None = None
    operations: float | None = None
    traffic: dict[str, float] | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    device: str = ""


@dataclass
class SameStep:
    """All sources of one step.

    Attributes:
        measured: for each measured source, what it says of a rank.
    """

    line: str
    estimates: list[tuple[str, Estimate]] = field(default_factory=list)
    simulations: list[tuple[str, Simulation]] = field(default_factory=list)
    measured: list[Callable[[int], Side]] = field(default_factory=list)


def steps_section(inputs: ReportInputs) -> Section:
    """A table and a picture for each rank's step that was found out in two ways at least."""
    section = Section(
        "Estimated, simulated, measured",
        "One step, found out by formulas (tools/estimate.py), by the real code on tensors without memory "
        "(tools/simulate.py) and in real steps (tools/benchmark.py, runs). Memory, operations and bytes are those of "
        "one rank: the one that was simulated, or else the fullest. Operations are matrix products and attention "
        "without its mask, recomputation included. In brackets is the difference from the first measured figure, or "
        "where nothing was measured from the simulated one; a time is compared only where the estimate is for the "
        "device that was measured.",
    )
    for same in sorted(_steps(inputs), key=lambda same: not same.measured):
        found = [(rank, _sides(same, rank)) for rank in _ranks(same)]
        found = [(rank, sides) for rank, sides in found if len({side.way for side in sides}) > 1]
        for rank, sides in found:
            section.tables.append(_table(f"{same.line}; rank {rank}", sides))
            section.pictures += _picture(same.line, rank, sides)
        if not found and (same.estimates or same.simulations):
            names = [f"{name} ({ESTIMATED})" for name, _ in same.estimates]
            names += [f"{name} ({SIMULATED})" for name, _ in same.simulations]
            inputs.problems.append(f"nothing to compare with {', '.join(names)}: {same.line}")
    return section


def _steps(inputs: ReportInputs) -> list[SameStep]:
    """By fingerprint. What does not name its step is named in `problems`."""
    found: dict[str, SameStep] = {}
    nameless = []
    for name, estimate in inputs.estimates.items():
        if estimate.step is None:
            nameless.append(name)
        else:
            found.setdefault(estimate.step.fingerprint, SameStep(estimate.step.line)).estimates.append((name, estimate))
    for name, simulation in inputs.simulations.items():
        if simulation.step is None:
            nameless.append(name)
        else:
            same = found.setdefault(simulation.step.fingerprint, SameStep(simulation.step.line))
            same.simulations.append((name, simulation))
    for name, benchmark in inputs.benchmarks.items():
        device = (benchmark.machine or Machine()).device
        named = [(row, row.step) for row in benchmark.distinct() if row.step is not None]
        nameless += [] if named else [name]
        for row, step in named:
            side = partial(_of_row, row, f"{name}, {row.label}", device)
            found.setdefault(step.fingerprint, SameStep(step.line)).measured.append(side)
    for run in inputs.runs:
        seconds, speed = run.median("step_time_s"), run.median("tokens_per_s")
        if run.config is not None and run.processes and seconds and speed:
            step = Step(**identify_step(run.config, run.processes))
            device = (run.facts.machine or Machine()).device
            whole = Side(MEASURED, f"run {run.name}", seconds=seconds, tokens_per_s=speed, device=device)
            found.setdefault(step.fingerprint, SameStep(step.line)).measured.append(partial(_of_run, whole))
    if nameless:
        inputs.problems.append(f"made before files named their step, so in no pair: {', '.join(nameless)}")
    return [*found.values()]


def _of_row(row: Row, source: str, device: str, rank: int) -> Side:
    ranks = row.ranks or []
    side = Side(MEASURED, source, seconds=row.median_s, tokens_per_s=row.tokens_per_s, device=device)
    if rank >= len(ranks):
        return side
    mine = ranks[rank]
    return replace(side, memory=mine.memory, operations=mine.operations, traffic=_by_group(mine.traffic))


def _of_run(side: Side, _rank: int) -> Side:
    return side


def _stage_ranks(estimate: Estimate) -> int:
    """Ranks of a pipeline stage; 0 where the estimate's numbers do not fit each other."""
    world, stages = estimate.world_size or 0, len(estimate.stages)
    return 0 if world % stages else world // stages


def _ranks(same: SameStep) -> list[int]:
    """Those that were simulated, else the first of the stage that the estimate finds fullest, else the first."""
    if simulated := sorted({s.rank for _, s in same.simulations if s.rank is not None}):
        return simulated
    for _, estimate in same.estimates:
        if _stage_ranks(estimate):
            peaks = [stage.memory.parts.total for stage in estimate.stages]
            return [peaks.index(max(peaks)) * _stage_ranks(estimate)]
    return [0]


def _sides(same: SameStep, rank: int) -> list[Side]:
    """What all sources say of a rank; the estimate inside of a simulation counts where there is no other."""
    found = list(_estimated(same, rank))
    simulations = [(name, s) for name, s in same.simulations if s.rank == rank]
    if not same.estimates:
        found += [_of(ESTIMATED, name, s.estimated) for name, s in simulations if s.estimated is not None][:1]
    found += [_of(SIMULATED, name, s.counted) for name, s in simulations]
    return found + [side(rank) for side in same.measured]


def _estimated(same: SameStep, rank: int) -> Iterator[Side]:
    for name, estimate in same.estimates:
        size = _stage_ranks(estimate)
        if size and rank < (estimate.world_size or 0):
            machine = (estimate.machine.name if estimate.machine else None) or ""
            seconds = estimate.seconds.step if estimate.seconds else None
            source = f"{name}, for {machine}" if machine else name
            yield _of(ESTIMATED, source, estimate.stages[rank // size], seconds, estimate.tokens_per_second, machine)


def _of(
    way: str, source: str, figures: Figures, seconds: float | None = None, speed: float | None = None, device: str = ""
) -> Side:
    operations = figures.flops
    if figures.operations is not None:
        operations = figures.operations.passes + figures.operations.recomputation
    traffic = None if figures.flows is None else _by_group(figures.traffic())
    return Side(way, source, figures.memory.parts, operations, traffic, seconds, speed, device)


def _by_group(kinds: dict[str, float]) -> dict[str, float]:
    """Bytes by kind and group, named `GROUP kind`, added up over kinds."""
    found: dict[str, float] = {}
    for name, size in kinds.items():
        group = name.rpartition(" ")[0]
        found[group] = found.get(group, 0) + size
    return found


def unit_of(values: Sequence[float | None], small: tuple[str, float], large: tuple[str, float]) -> tuple[str, float]:
    """The larger unit where a value has ten of it."""
    return large if max((v or 0 for v in values), default=0) >= 10 * large[1] else small


def bytes_unit(values: Sequence[float | None]) -> tuple[str, float]:
    """MiB or GiB."""
    return unit_of(values, ("MiB", MIB), ("GiB", GIB))


def _table(title: str, sides: list[Side]) -> Table:
    peaks = [None if s.memory is None else s.memory.total for s in sides]
    memory, volume = bytes_unit(peaks), bytes_unit([v for s in sides for v in (s.traffic or {}).values()])
    operations = unit_of([s.operations for s in sides], ("GFLOP", 1e9), ("TFLOP", 1e12))
    columns = {f"peak memory, {memory[0]}": _beside(sides, peaks, memory[1])}
    columns[f"operations, {operations[0]}"] = _beside(sides, [s.operations for s in sides], operations[1])
    for group in sorted({group for s in sides for group in s.traffic or {}}):
        sent = [None if s.traffic is None else s.traffic.get(group, 0.0) for s in sides]
        columns[f"{group}, {volume[0]}"] = _beside(sides, sent, volume[1])
    columns["ms/step"] = _beside(sides, [s.seconds for s in sides], 1e-3, same_device=True)
    columns["tokens/s"] = _beside(sides, [s.tokens_per_s for s in sides], 1.0, same_device=True)
    rows = [
        {"found out by": f"{side.way}: {side.source}", **{name: cells[i] for name, cells in columns.items()}}
        for i, side in enumerate(sides)
    ]
    return Table(rows, title=title)


def _beside(sides: list[Side], values: list[float | None], unit: float, same_device: bool = False) -> list[str]:
    """Each value beside the first that was measured, or else simulated; times only where the device is the same."""
    ways = (MEASURED,) if same_device else (MEASURED, SIMULATED)
    known = [i for way in ways for i, s in enumerate(sides) if s.way == way and values[i] is not None]
    first = known[0] if known else None
    cells = []
    for i, value in enumerate(values):
        compared = first is not None and i != first and not (same_device and not _same_device(sides[i], sides[first]))
        cells.append(_cell(value, values[first] if compared and first is not None else None, unit))
    return cells


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
        return side.device == measured.device
    name = side.device.lower().partition("-")[0]
    return bool(name) and name in measured.device.lower()


def _picture(line: str, rank: int, sides: list[Side]) -> list[Bars]:
    """Bars of memory by part; measured rows that hold the same are drawn once."""
    kept: list[tuple[Side, Memory]] = []
    for side in sides:
        if side.memory is not None and (side.way, side.memory) not in [(s.way, m) for s, m in kept]:
            kept.append((side, side.memory))
    ways = [side.way for side, _ in kept]
    names = [s.way if ways.count(s.way) == 1 else f"{s.way}, {s.source}" for s, _ in kept]
    return [memory_bars(f"Peak memory of rank {rank}", line, names, [m for _, m in kept])] if kept else []


def memory_bars(title: str, caption: str, names: Sequence[str], found: Sequence[Memory]) -> Bars:
    """Bars of memory by part, in the unit that suits the largest."""
    unit, size = bytes_unit([memory.total for memory in found])
    parts = [(text, [getattr(memory, key) / size for memory in found]) for key, text in PARTS.items()]
    return Bars(title, caption, unit, names, parts)
