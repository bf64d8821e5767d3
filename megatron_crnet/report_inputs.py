"""Reads what a scaling report is made from; what is missing or damaged becomes a line, and the rest is read."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_crnet.arithmetic import flops_per_token
from megatron_crnet.config import Config
from megatron_crnet.errors import CrnetError
from megatron_crnet.provenance import RUN_FILE
from megatron_crnet.settings import load_config

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        lines: of metrics.jsonl, those that are whole.
        config: None where config.yaml cannot be read.
        facts: run.json; empty where it cannot be read.
    """

    name: str
    lines: list[dict[str, Any]]
    config: Config | None
    facts: dict[str, Any]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of every line that has both."""
        return [(line["tokens"], line[key]) for line in self.lines if are_numbers(line, "tokens", key)]

    def points_over_time(self, key: str) -> list[tuple[float, float]]:
        """(seconds of training, value), validation and saving left out of the time."""
        found, seconds, last = [], 0.0, 0
        for line in self.lines:
            if are_numbers(line, "step", "step_time_s"):
                seconds += line["step_time_s"] * (line["step"] - last)
                last = line["step"]
            if are_numbers(line, key):
                found.append((seconds, float(line[key])))
        return found

    def median(self, key: str) -> float | None:
        """Over the lines but the first, which holds what starts up."""
        values = [line[key] for line in self.lines if are_numbers(line, key)]
        return statistics.median(values[1:] or values) if values else None

    @property
    def processes(self) -> int | None:
        """As run.json says, else what follows from the two rates of a metrics line."""
        known = self.facts.get("world_size")
        if isinstance(known, int) and known > 0:
            return known
        tokens, tflops = self.median("tokens_per_s"), self.median("tflops_per_device")
        if self.config is None or not tokens or not tflops:
            return None
        found = flops_per_token(self.config.model, self.config.training.seq_length) * tokens / (tflops * 1e12)
        near = round(found)
        # padded samples count fewer tokens than positions, and then this rule does not hold
        return near if near > 0 and abs(found / near - 1) < 0.02 else None


@dataclass(frozen=True)
class Figures:
    """One rank of an estimate or a simulation.

    Attributes:
        parts: bytes of memory by part; they add up to the peak.
        traffic: bytes of a step by group and kind.
    """

    name: str
    parts: dict[str, float]
    traffic: dict[str, float]


@dataclass
class Evidence:
    """All that could be read, and a line for each thing that could not."""

    runs: list[Run] = field(default_factory=list)
    benchmarks: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """The files that `figures` were found in, as they are; empty for one that is no mapping."""
    recompute: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all was read."""
        return not (self.runs or self.benchmarks or self.figures or self.recompute)

    def measured(self, *sweeps: str) -> list[tuple[str, list[dict[str, Any]]]]:
        """Benchmarks that have rows of these sweeps (of any, without sweeps), with those rows.

        Each stays for itself: what one file's first row is to another's nobody has measured.
        """
        found = [
            (name, [row for row in record["rows"] if not sweeps or row["sweep"] in sweeps])
            for name, record in self.benchmarks
        ]
        return [(name, rows) for name, rows in found if rows]


def read_evidence(paths: list[Path]) -> Evidence:
    """Folders of runs, and files of benchmarks, estimates, simulations and recomputation."""
    evidence = Evidence()
    for path in paths:
        if path.is_dir():
            _read_folder(path, evidence)
        elif path.suffix == ".jsonl":
            _read_run(path, evidence)
        else:
            _read_json(path, evidence)
    return evidence


def _read_folder(folder: Path, evidence: Evidence) -> None:
    files = sorted(file for file in folder.glob("*.json") if file.name != RUN_FILE)
    if not files and not (folder / METRICS).exists():
        evidence.problems.append(f"{folder} holds no {METRICS} and no JSON file: give the folder of a run")
    if (folder / METRICS).exists():
        _read_run(folder / METRICS, evidence)
    for file in files:
        _read_json(file, evidence)


def _read_run(path: Path, evidence: Evidence) -> None:
    text, folder = _text(path, evidence), path.parent
    if text is None:
        return
    lines, damaged = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict) and are_numbers(value, "step"):
            lines.append(value)
        else:
            damaged.append(number)
    if damaged:
        which = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines, the first of them {damaged[0]},"
        evidence.problems.append(f"{path}: {which} cannot be read: left out")
    if not any(are_numbers(line, "tokens", "loss") for line in lines):
        evidence.problems.append(f"{path} has no line with tokens and loss: the run is left out")
        return
    evidence.runs.append(Run(_short(folder), lines, _config(folder, evidence), _facts(folder, evidence)))


def _config(folder: Path, evidence: Evidence) -> Config | None:
    try:
        return load_config(folder / "config.yaml")
    except CrnetError as error:
        evidence.problems.append(f"{folder}: no parameters, operations and layout, because {error}")
        return None


def _facts(folder: Path, evidence: Evidence) -> dict[str, Any]:
    found = _parsed(folder / RUN_FILE, evidence)
    return found if isinstance(found, dict) else {}


def _text(path: Path, evidence: Evidence) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is no text"
        evidence.problems.append(f"{path} cannot be read ({reason}): left out")
        return None


def _parsed(path: Path, evidence: Evidence) -> Any:
    text = _text(path, evidence)
    try:
        return None if text is None else json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        evidence.problems.append(f"{path} is no whole JSON{place}: left out")
        return None


def _read_json(path: Path, evidence: Evidence) -> None:
    known, value = len(evidence.problems), _parsed(path, evidence)
    name = _short(path.with_suffix(""))
    if isinstance(value, dict) and value.get("kind") == "benchmark":
        _read_benchmark(path, name, value, evidence)
    elif isinstance(value, dict) and value.get("kind") == "recompute":
        _read_strategies(path, name, value, evidence)
    elif found := list(_find_figures(name, value)):
        evidence.figures += found
        evidence.records.append((name, value if isinstance(value, dict) else {}))
    elif len(evidence.problems) == known:
        evidence.problems.append(
            f"{path} holds no benchmark, estimate, simulation or strategies of recomputation: left out"
        )


MEASURED = (
    *("median_s", "spread", "tokens_per_s", "tflops_per_device", "peak_bytes", "parameters", "flops_per_token"),
    *("tokens_per_step", "speed_of_first", "cpu_speed_of_first"),
)
"""Numbers that a row which was measured must have."""


def _read_benchmark(path: Path, name: str, record: dict[str, Any], evidence: Evidence) -> None:
    rows, kept = record.get("rows"), []
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("sweep", "name")):
            evidence.problems.append(f"{path}: row {number} is damaged: left out")
        elif "median_s" not in row:
            reason = row.get("error") or "the run was stopped before its turn"
            evidence.problems.append(f"{path}: row {row['name']} was not measured: {reason}")
        elif not _is_measured(row):
            evidence.problems.append(f"{path}: row {row['name']} is damaged: left out")
        else:
            kept.append(row)
            if row.get("error"):
                evidence.problems.append(f"{path}: row {row['name']} was measured in part: {row['error']}")
    if not kept:
        evidence.problems.append(f"{path} is a benchmark without a measured row: left out")
        return
    evidence.benchmarks.append((name, {**record, "rows": kept}))


def _is_measured(row: dict[str, Any]) -> bool:
    if not are_numbers(row, "processes", *MEASURED) or min(row["processes"], row["speed_of_first"]) <= 0:
        return False
    memory, traffic = row.get("memory"), row.get("traffic")
    if not isinstance(memory, dict) or not isinstance(traffic, dict):
        return False
    return are_numbers(memory, "weights", "optimizer", "gradients", "activations") and are_numbers(traffic, *traffic)


def _read_strategies(path: Path, name: str, record: dict[str, Any], evidence: Evidence) -> None:
    rows = record.get("rows")
    kept = [row for row in rows if _is_strategy(row)] if isinstance(rows, list) else []
    if not kept or len(kept) < len(rows or []):
        left = "it is left out" if not kept else f"{len(kept)} of its {len(rows or [])} rows are taken"
        evidence.problems.append(f"{path} holds damaged strategies of recomputation: {left}")
    if kept:
        evidence.recompute.append((name, {**record, "rows": kept}))


def _is_strategy(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str) and are_numbers(row, "peak", "kept", "flops")


def _find_figures(name: str, value: Any, depth: int = 0) -> Iterator[Figures]:
    """Wherever in the first levels a mapping has `memory`: an estimate's stages, a simulation's two sides."""
    if isinstance(value, list):
        value = {f"stage {i}": item for i, item in enumerate(value)}
    if not isinstance(value, dict) or depth > 3:
        return
    if parts := memory_parts(value.get("memory")):
        yield Figures(name, parts, bytes_by_kind(value.get("flows")))
        return
    for key, item in value.items():
        if isinstance(item, dict | list):
            yield from _find_figures(name if key == "stages" else f"{name}, {key}", item, depth + 1)


def memory_parts(memory: Any) -> dict[str, float]:
    """The parts of a benchmark's row, from the finer ones of an estimate (`figures.Memory`); empty if damaged."""
    if not isinstance(memory, dict):
        return {}
    if not are_numbers(memory, "weights", "gradients", "optimizer", "kept", "transient"):
        return {}
    others = {name: memory.get(name, 0) for name in ("buffers", "reduction", "update")}
    if not are_numbers(others, *others):
        return {}
    return {
        "weights": memory["weights"],
        "optimizer": memory["optimizer"] + others["buffers"],
        "gradients": memory["gradients"],
        "activations": max(memory["kept"] + memory["transient"], others["reduction"], others["update"]),
    }


def bytes_by_kind(flows: Any) -> dict[str, float]:
    """Of an estimate's or a simulation's flows, by `GROUP kind`."""
    found: dict[str, float] = {}
    for flow in flows if isinstance(flows, list) else []:
        if isinstance(flow, dict) and are_numbers(flow, "bytes"):
            kind = f"{flow.get('group')} {flow.get('kind')}"
            found[kind] = found.get(kind, 0) + flow["bytes"]
    return found


def are_numbers(values: dict[str, Any], *keys: str) -> bool:
    """Whether all of these are there, are numbers and are finite."""
    found = [values.get(key) for key in keys]
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in found)


def _short(path: Path) -> str:
    """The last part of a path's name, which says enough and gives no folder of a machine away."""
    return path.resolve().name
