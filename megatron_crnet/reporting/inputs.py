"""Reads the inputs of a report into tables. What is missing or damaged is a line in `problems`; the rest is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from megatron_crnet.config.loading import load_config
from megatron_crnet.config.schema import Config
from megatron_crnet.reporting.records import KINDS, Head, MetricsLine, Row, check, numbered, parse, printable, reason
from megatron_crnet.reporting.step_identity import identify_step
from megatron_crnet.utils.environment import RUN_FILE
from megatron_crnet.utils.errors import CrnetError

METRICS, PROFILES = "metrics.jsonl", "profile/*/profile.json"
ESTIMATED, SIMULATED, MEASURED = "estimated", "simulated", "measured"
SAME = ("median_s", "spread")
"""What two rows of a benchmark share only if one was measured for both."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        lines: a row per line of metrics.jsonl, and `seconds` of training so far, validation and saving left out.
        config: None where config.yaml cannot be read.
        facts: of run.json.
    """

    name: str
    lines: pd.DataFrame
    config: Config | None
    facts: dict[str, Any]

    def points(self, key: str, over: str = "tokens") -> list[tuple[float, float]]:
        """(tokens or seconds, value) of every line that has both."""
        return list(self.lines[[over, key]].dropna().itertuples(index=False, name=None))

    def last(self, key: str) -> float | None:
        """The value of the last line that has one."""
        found = self.lines[key].dropna()
        return None if found.empty else float(found.iloc[-1])

    def median(self, key: str) -> float | None:
        """Over the lines but the first, which holds what starts up."""
        found = self.lines[key].dropna()
        return None if found.empty else float((found.iloc[1:] if len(found) > 1 else found).median())

    @property
    def processes(self) -> int | None:
        """As run.json says."""
        return self.facts["world_size"]


@dataclass
class ReportInputs:
    """All that could be read; see `reporting/records.py` for fields.

    Attributes:
        records: a row per file of figures: its name and head.
        rows: a row per measured row of a benchmark; the same again where another sweep has it as well.
        profiles: a row per rank, or ranks from `first` up to `last`, whose step was estimated, simulated or measured
            (`way`): memory by part, operations, traffic, times; missing where unknown.
        problems: a line for each thing that could not be read.
    """

    runs: list[Run] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self) -> list[str]:
        """The problems, for a page or a terminal."""
        return [printable(problem) for problem in self.problems]

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all was read."""
        return not (self.runs or self.records)

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """Files of these kinds."""
        return [record for record in self.records if record["kind"] in kinds]

    def summary(self) -> str:
        """How much was read."""
        left_out = f" Left out, named at the end: {len(self.problems)}." if self.problems else ""
        rarer = {f"{kind}s": len(self.of_kind(kind)) for kind in ("profile", "observation")}
        return (
            f"Made from runs: {len(self.runs)}, benchmarks: {len(self.of_kind('benchmark'))}, estimates and "
            f"simulations: {len(self.of_kind('estimate', 'simulation'))}"
            f"{''.join(f', {kind}: {count}' for kind, count in rarer.items() if count)}.{left_out}"
        )

    @contextmanager
    def naming(self, what: object) -> Iterator[list[str]]:
        """Note in `problems` what the block cannot read, and the fields that it adds to the list."""
        damaged: list[str] = []
        try:
            yield damaged
        except (OSError, ValueError, RecursionError) as error:  # JSON's and pydantic's are ValueErrors, too
            self.problems.append(f"{what} {reason(error)}: left out")
        if damaged:
            self.problems.append(f"{what}: damaged and left out: {', '.join(dict.fromkeys(damaged))}")


def read_inputs(paths: Iterable[Path]) -> ReportInputs:
    """Folders of runs, and files of benchmarks, estimates and simulations."""
    found = ReportInputs()
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.glob("*.json") if file.name != RUN_FILE)
            if (path / METRICS).exists():
                files = [path / METRICS, *files, *sorted(path.glob(PROFILES))]
            elif not files:
                found.problems.append(f"{path} holds no {METRICS} and no JSON file: give the folder of a run")
        for file in files:
            (read_run if file.suffix == ".jsonl" else _read_file)(file, found)
    return found


def read_run(path: Path, found: ReportInputs) -> None:
    """Add the run whose metrics.jsonl this is."""
    with found.naming(path):
        lines, damaged = [], []
        # a damaged byte costs its line, not the run
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            notes: list[str] = []
            try:
                lines.append(check(MetricsLine, parse(line), notes))
            except (ValueError, RecursionError):
                notes.append("")
            damaged += [number] * bool(notes)
        if damaged:
            several = f"{len(damaged)} lines, the first of them {damaged[0]},"
            which = several if len(damaged) > 1 else f"line {damaged[0]}"
            found.problems.append(f"{path}: {which} cannot be read, or not as a whole: left out")
        if any(line["tokens"] is not None and line["loss"] is not None for line in lines):
            name = numbered(_short(path.parent), {run.name for run in found.runs})
            config, facts = _config(path.parent, found), _facts(path.parent, found)
            run = Run(name, _with_seconds(pd.DataFrame(lines, dtype=float)), config, facts)
            found.runs.append(run)
            seconds, speed = run.median("step_time_s"), run.median("tokens_per_s")
            if config is not None and run.processes and seconds and speed:
                step = {"step": identify_step(config, run.processes), "first": 0, "last": float("inf")}
                times = {"seconds": seconds, "tokens_per_s": speed, "device": device(facts)}
                found.profiles.append(
                    {**dict.fromkeys(("name", "source"), f"run {name}"), "way": MEASURED, **step, **times}
                )
        else:
            found.problems.append(f"{path} has no line with tokens and loss: the run is left out")


def _with_seconds(lines: pd.DataFrame) -> pd.DataFrame:
    timed = lines.dropna(subset="step_time_s")
    seconds = (timed["step_time_s"] * timed["step"].diff().fillna(timed["step"]).clip(lower=0)).cumsum()
    return lines.assign(seconds=seconds.reindex(lines.index).ffill().fillna(0.0))


def _config(folder: Path, found: ReportInputs) -> Config | None:
    try:
        return load_config(folder / "config.yaml")
    except (CrnetError, RecursionError) as error:
        why = error if isinstance(error, CrnetError) else "config.yaml nests too deeply"
        found.problems.append(f"{folder}: no parameters, operations and layout, because {why}")
        return None


def _facts(folder: Path, found: ReportInputs) -> dict[str, Any]:
    with found.naming(folder / RUN_FILE) as damaged:
        return check(Head, parse((folder / RUN_FILE).read_text("utf-8")), damaged)
    return check(Head, {}, [])


def _read_file(path: Path, found: ReportInputs) -> None:
    with found.naming(path) as damaged:
        value = parse(path.read_text("utf-8"))
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            found.problems.append(f"{path} holds no benchmark, estimate, simulation, profile or observation: left out")
            return
        if kind == "benchmark":
            value = {**value, "rows": _rows(path, value.get("rows"), found)}
            if not value["rows"]:
                found.problems.append(f"{path} has no row that was measured and is whole: left out")
                return
        name, known = _short(path.with_suffix("")), {record["name"] for record in found.records}
        facts = check(KINDS[kind], value, damaged)
        if kind == "profile":
            above = path.absolute().parents  # RUN/profile/steps_A-B/profile.json, or a copy somewhere
            run = above[2] if len(above) > 2 else path.with_suffix("")
            name = f"{_short(run)}, steps {' to '.join(map(str, facts['steps']))}"
        record = {**facts, "name": numbered(name, known), "kind": kind}
        found.records.append(record)
        if add := {"benchmark": _add_rows, "estimate": _add_stages, "simulation": _add_rank}.get(kind):
            add(record, found)


def _rows(path: Path, rows: Any, found: ReportInputs) -> list[dict[str, Any]]:
    whole = []
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        named = isinstance(row, dict) and isinstance(row.get("name"), str)
        what = f"{path}: row {number}" + (f", {row['name'][:100]}," if named else "")
        if named and "median_s" not in row:
            why = row.get("error") or "the run was stopped before its turn"
            found.problems.append(f"{what} was not measured: {str(why)[:300]}")
            continue
        with found.naming(what) as damaged:
            whole.append(check(Row, row, damaged))
            if row.get("error"):
                found.problems.append(f"{what} was measured in part: {str(row['error'])[:300]}")
    return whole


def _add_rows(record: dict[str, Any], found: ReportInputs) -> None:
    seen: set[tuple[float, ...]] = set()
    for row in record["rows"]:
        name, count = row["name"], row["processes"]
        ranks = f", {count} ranks" if count > 1 and "process" not in name else ""
        label = f"{'' if row['sweep'] == 'variants' else row['sweep'] + ': '}{name}{ranks}"
        found.rows.append({**row, **row["memory"], "benchmark": record["name"], "label": label})
        figures = tuple(row[key] for key in SAME)
        if figures in seen:
            continue
        seen.add(figures)
        times = {"seconds": row["median_s"], "tokens_per_s": row["tokens_per_s"], "device": device(record)}
        shared = {"way": MEASURED, "source": f"{record['name']}, {label}", "step": row["step"], **times}
        profiles = [{**rank["memory"], **rank} for rank in row["ranks"] or []]
        for i, profile in enumerate([*profiles, {}]):  # at last the ranks of which nothing is known
            last = float("inf") if i == len(profiles) else i + 1
            found.profiles.append({"name": record["name"], "first": i, "last": last, **shared, **profile})


def _add_stages(record: dict[str, Any], found: ReportInputs) -> None:
    world, stages, name = record["world_size"] or 0, record["stages"], record["name"]
    size = 0 if world % len(stages) else world // len(stages)  # no rank at all where the numbers do not fit
    machine = (record["machine"] or {}).get("name") or ""
    times = {"seconds": (record["seconds"] or {}).get("step"), "tokens_per_s": record["tokens_per_second"]}
    shared = {"way": ESTIMATED, "name": name, "source": f"{name}, for {machine}" if machine else name, **times}
    for i, stage in enumerate(stages):
        label = f"{name}, stage {i}" if len(stages) > 1 else name
        ranks = {"first": i * size, "last": (i + 1) * size, "step": record["step"], "device": machine, "label": label}
        found.profiles.append({**shared, **ranks, **_columns(stage)})


def _add_rank(record: dict[str, Any], found: ReportInputs) -> None:
    rank, shared = record["rank"], dict.fromkeys(("name", "source", "label"), record["name"])
    ranks = {"way": SIMULATED, "first": rank or 0, "last": 0 if rank is None else rank + 1, "step": record["step"]}
    found.profiles.append({**shared, **ranks, **_columns(record["counted"])})


def _columns(profile: dict[str, Any]) -> dict[str, Any]:
    """Memory split as benchmarks split it: what comes and goes with a step is `activations`, buffers included."""
    memory, operations, flows = profile["memory"], profile["operations"], profile["flows"]
    most = max(memory["kept"] + memory["transient"], memory["reduction"], memory["update"])
    traffic: Counter[str] = Counter()
    for flow in flows or []:
        traffic[f"{flow['group']} {flow['kind']}"] += flow["bytes"]
    return {
        **{part: memory[part] for part in ("weights", "optimizer", "gradients")},
        "activations": memory["buffers"] + most,
        "operations": profile["flops"] if operations is None else sum(operations.values()),
        "traffic": None if flows is None else dict(traffic),
    }


def device(record: dict[str, Any]) -> str:
    """What computed."""
    machine = record["machine"] or {}
    return str((machine.get("gpus") or [machine.get("processor") or ""])[0])


def _short(path: Path) -> str:
    """The last part of a path's name, which says enough and gives no folder of a machine away."""
    return printable(path.resolve().name)
