"""Reads what a report is made of. What is missing or damaged becomes a line in `problems`, and the rest is read.

Every value has a type that knows its range, so that nothing behind this module meets an infinity, a lone surrogate or
a number where a mapping belongs. A damaged field that a row can do without is left out of it; a row that lacks what
every row needs is left out whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, WrapValidator

from megatron_crnet.config.loading import load_config
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.environment import RUN_FILE
from megatron_crnet.utils.errors import CrnetError

METRICS = "metrics.jsonl"
LARGEST = 1e30
"""Beyond every count of bytes, tokens and operations, and small enough that products and sums stay finite."""


def _or_nothing(value: Any, check: Any, info: ValidationInfo) -> Any:
    if value is None:
        return None
    try:
        return check(value)
    except ValidationError:
        if isinstance(info.context, list):
            info.context.append(str(info.field_name))
        return None


T = TypeVar("T")


def printable(text: str) -> str:
    """On one line; what no terminal and no page can show is written as its number."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


Text = Annotated[str, Field(strict=True), AfterValidator(lambda text: printable(text)[:1000])]
Name = Annotated[Text, AfterValidator(lambda text: text[:100])]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Amount = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(ge=1 / LARGEST)]
Ratio = Annotated[Number, Field(ge=1e-9, le=1e9)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**7)]
Perhaps = Annotated[T | None, WrapValidator(_or_nothing)]
"""None where it is damaged, which the validation's context, a list, is told."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Memory(_Part):
    """Bytes of a rank by part, of a benchmark's row; they add up to the peak."""

    weights: Amount
    optimizer: Amount
    gradients: Amount
    activations: Amount

    @property
    def total(self) -> float:
        """The peak."""
        return self.weights + self.optimizer + self.gradients + self.activations


class FineMemory(_Part):
    """The finer parts of an estimate or a simulation (`figures.Memory`)."""

    weights: Amount
    gradients: Amount
    optimizer: Amount
    kept: Amount
    transient: Number
    buffers: Amount = 0
    reduction: Amount = 0
    update: Amount = 0

    @property
    def parts(self) -> Memory:
        """As a benchmark splits them: what comes and goes with a step is `activations`, buffers included."""
        most = max(self.kept + self.transient, self.reduction, self.update)
        return Memory(
            weights=self.weights,
            optimizer=self.optimizer,
            gradients=self.gradients,
            activations=self.buffers + most,
        )


class Flow(_Part):
    """Bytes of one kind of call in one group of ranks."""

    group: Name
    kind: Name
    bytes: Amount


class Operations(_Part):
    """Of a rank's step, by formula."""

    passes: Amount
    recomputation: Amount


class Figures(_Part):
    """One rank, estimated or counted in a simulation."""

    memory: FineMemory
    operations: Perhaps[Operations] = None
    flops: Perhaps[Amount] = None
    flows: Perhaps[list[Flow]] = None

    def traffic(self) -> dict[str, float]:
        """Bytes by group and kind."""
        found: dict[str, float] = {}
        for flow in self.flows or []:
            found[f"{flow.group} {flow.kind}"] = found.get(f"{flow.group} {flow.kind}", 0) + flow.bytes
        return found


class Step(_Part):
    """Which step figures are of (`reporting/step_identity.py`)."""

    fingerprint: Name
    line: Text


class Machine(_Part):
    """That figures were measured on, or are an estimate for."""

    name: Perhaps[Name] = None
    processor: Perhaps[Name] = None
    cores: Perhaps[Count] = None
    gpus: Perhaps[list[Name]] = None
    load_average: Perhaps[Amount] = None
    load_average_at_end: Perhaps[Amount] = None
    peak_flops: Perhaps[Positive] = None

    @property
    def device(self) -> str:
        """What computes."""
        return (self.gpus or [self.processor or ""])[0]


class Record(_Part):
    """What stands at the head of every file of figures."""

    kind: Perhaps[Name] = None
    command: Perhaps[Text] = None
    machine: Perhaps[Machine] = None
    versions: Perhaps[dict[Name, Name]] = None
    step: Perhaps[Step] = None
    world_size: Perhaps[Count] = None


class Seconds(_Part):
    """Of an estimate's step."""

    step: Positive


class Estimate(Record):
    """A file of tools/estimate.py."""

    stages: Annotated[list[Figures], Field(min_length=1)]
    seconds: Perhaps[Seconds] = None
    tokens_per_second: Perhaps[Positive] = None


class Simulation(Record):
    """A file of tools/simulate.py."""

    rank: Perhaps[Annotated[int, Field(strict=True, ge=0, le=10**7)]] = None
    counted: Figures
    estimated: Perhaps[Figures] = None


class Rank(_Part):
    """One rank of a benchmark's row."""

    memory: Memory
    traffic: dict[Name, Amount]
    operations: Perhaps[Amount] = None


class Row(_Part):
    """A row of a benchmark that was measured."""

    sweep: Name
    name: Name
    processes: Count
    parameters: Amount
    flops_per_token: Amount
    tokens_per_step: Amount
    median_s: Positive
    spread: Amount
    tokens_per_s: Positive
    peak_bytes: Amount
    memory: Memory
    traffic: dict[Name, Amount]
    speed_of_first: Ratio
    cpu_speed_of_first: Ratio
    mfu: Perhaps[Amount] = None
    mfu_whole_attention: Perhaps[Amount] = None
    step: Perhaps[Step] = None
    ranks: Perhaps[list[Rank]] = None

    @property
    def label(self) -> str:
        """Its name among rows of other sweeps."""
        ranks = f", {self.processes} ranks" if self.processes > 1 and "process" not in self.name else ""
        return f"{self.name}{ranks}" if self.sweep == "variants" else f"{self.sweep}: {self.name}{ranks}"


class Benchmark(Record):
    """A file of tools/benchmark.py, with the rows that were measured and are whole."""

    device: Perhaps[Name] = None
    complete: Perhaps[Annotated[bool, Field(strict=True)]] = None
    peak_flops: Perhaps[Positive] = None
    peak_source: Perhaps[Text] = None
    rows: list[Row]

    def distinct(self) -> list[Row]:
        """Without rows that another sweep has measured already, which have the same times to the last digit."""
        found: dict[tuple[float, float], Row] = {}
        for row in self.rows:
            found.setdefault((row.median_s, row.spread), row)
        return list(found.values())

    def of(self, *sweeps: str) -> list[Row]:
        """Rows of these sweeps."""
        return [row for row in self.rows if row.sweep in sweeps]


class Strategy(_Part):
    """A strategy of recomputation, counted."""

    name: Name
    kept: Amount
    peak: Amount
    flops: Amount


class Recompute(Record):
    """A file of tools/measure_recompute.py, with the rows that are whole."""

    rows: list[Strategy]


class Line(_Part):
    """A line of metrics.jsonl."""

    step: Annotated[Amount, Field(le=1e15)]
    tokens: Perhaps[Amount] = None
    loss: Perhaps[Number] = None
    step_time_s: Perhaps[Amount] = None
    tokens_per_s: Perhaps[Amount] = None
    tflops_per_device: Perhaps[Amount] = None
    validation_loss: Perhaps[Number] = None
    validation_perplexity: Perhaps[Number] = None


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        lines: a row for each line of metrics.jsonl, and `seconds` of training so far, validation and saving left out.
        config: None where config.yaml cannot be read.
        facts: of run.json.
    """

    name: str
    lines: pd.DataFrame
    config: Config | None
    facts: Record

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

    @cached_property
    def processes(self) -> int | None:
        """As run.json says, else what follows from the two rates of a metrics line."""
        if self.facts.world_size:
            return self.facts.world_size
        tokens, tflops = self.median("tokens_per_s"), self.median("tflops_per_device")
        if self.config is None or not tokens or not tflops:
            return None
        found = flops_per_token(self.config.model, self.config.training.seq_length) * tokens / (tflops * 1e12)
        near = round(found)
        # padded samples count fewer tokens than positions, and then this rule does not hold
        return near if near > 0 and abs(found / near - 1) < 0.02 else None


@dataclass
class ReportInputs:
    """All that could be read, by name, and a line for each thing that could not."""

    runs: list[Run] = field(default_factory=list)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    simulations: dict[str, Simulation] = field(default_factory=dict)
    recompute: dict[str, Recompute] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def records(self) -> Iterator[tuple[str, Record]]:
        """Everything with a command and a machine."""
        yield from ((run.name, run.facts) for run in self.runs)
        for kind in (self.benchmarks, self.estimates, self.simulations, self.recompute):
            yield from kind.items()

    def say(self) -> list[str]:
        """The problems, for a page or a terminal."""
        return [printable(problem) for problem in self.problems]

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all was read."""
        return not any(True for _ in self.records())


def read_inputs(paths: list[Path]) -> ReportInputs:
    """Folders of runs, and files of benchmarks, estimates, simulations and recomputation."""
    found = ReportInputs()
    for path in paths:
        if path.is_dir():
            _read_folder(path, found)
        elif path.suffix == ".jsonl":
            read_run(path, found)
        else:
            _read_file(path, found)
    return found


def _read_folder(folder: Path, found: ReportInputs) -> None:
    files = sorted(file for file in folder.glob("*.json") if file.name != RUN_FILE)
    if (folder / METRICS).exists():
        read_run(folder / METRICS, found)
    elif not files:
        found.problems.append(f"{folder} holds no {METRICS} and no JSON file: give the folder of a run")
    for file in files:
        _read_file(file, found)


def read_run(path: Path, found: ReportInputs) -> None:
    """Add the run whose metrics.jsonl this is."""
    text, lines = _text(path, found, errors="replace"), []  # a damaged byte costs its line, not the run
    damaged: list[int] = []
    for number, line in enumerate((text or "").splitlines(), 1):
        notes: list[str] = []
        try:
            lines.append(Line.model_validate(_parse(line), context=notes))
        except (ValueError, RecursionError):  # pydantic's and JSON's errors are ValueErrors
            notes.append("")
        damaged += [number] * bool(notes)
    if damaged:
        which = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines, the first of them {damaged[0]},"
        found.problems.append(f"{path}: {which} cannot be read, or not as a whole: left out")
    if text is not None and not any(line.tokens is not None and line.loss is not None for line in lines):
        found.problems.append(f"{path} has no line with tokens and loss: the run is left out")
    elif text is not None:
        folder = path.parent
        frame = _with_seconds(pd.DataFrame([line.model_dump() for line in lines], columns=[*Line.model_fields]))
        found.runs.append(Run(_short(folder), frame, _config(folder, found), _facts(folder / RUN_FILE, found)))


def _with_seconds(lines: pd.DataFrame) -> pd.DataFrame:
    lines = lines.astype(float)
    timed = lines.dropna(subset="step_time_s")
    seconds = (timed["step_time_s"] * timed["step"].diff().fillna(timed["step"]).clip(lower=0)).cumsum()
    return lines.assign(seconds=seconds.reindex(lines.index).ffill().fillna(0.0))


def _config(folder: Path, found: ReportInputs) -> Config | None:
    try:
        return load_config(folder / "config.yaml")
    except (CrnetError, RecursionError) as error:
        reason = error if isinstance(error, CrnetError) else "config.yaml nests too deeply"
        found.problems.append(f"{folder}: no parameters, operations and layout, because {reason}")
        return None


def _facts(path: Path, found: ReportInputs) -> Record:
    value, notes = _json(path, found), list[str]()
    try:
        facts = Record.model_validate({} if value is None else value, context=notes)
    except ValidationError as error:
        found.problems.append(f"{path} is damaged ({_reason(error)}): left out")
        return Record()
    _name_damage(path, notes, found)
    return facts


def _text(path: Path, found: ReportInputs, errors: str = "strict") -> str | None:
    try:
        return path.read_text("utf-8", errors)
    except (OSError, ValueError) as error:  # also a name with a NUL
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is no text"
        found.problems.append(f"{path} cannot be read ({reason}): left out")
        return None


def _parse(text: str) -> Any:
    """A JSON value; a number that no range holds is infinite, whatever its number of digits."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 25 else float(digits))


def _json(path: Path, found: ReportInputs) -> Any:
    text = _text(path, found)
    try:
        return None if text is None else _parse(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ": it nests too deeply"
        found.problems.append(f"{path} is not valid JSON{place}: left out")
        return None


def _read_file(path: Path, found: ReportInputs) -> None:
    known, value = len(found.problems), _json(path, found)
    if len(found.problems) > known:
        return
    kinds: tuple[tuple[str, Any, Any], ...] = (
        ("benchmark", Benchmark, found.benchmarks),
        ("recompute", Recompute, found.recompute),
        ("simulation", Simulation, found.simulations),
        ("estimate", Estimate, found.estimates),
    )
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind is None and isinstance(value, dict):  # as these tools wrote before they named themselves
        kind = "simulation" if "counted" in value else "estimate" if "stages" in value else None
    for name, model, target in kinds:
        if kind == name:
            _read_record(path, value, model, target, found)
            return
    found.problems.append(f"{path} holds no benchmark, estimate, simulation or strategies of recomputation: left out")


def _read_record(path: Path, value: dict[str, Any], model: Any, target: dict[str, Any], found: ReportInputs) -> None:
    notes, wanted = list[str](), value
    if "rows" in model.model_fields:
        row = {Benchmark: Row, Recompute: Strategy}[model]
        wanted = {**value, "rows": list(_rows(path, value.get("rows"), row, found))}
        if not wanted["rows"]:
            found.problems.append(f"{path} has no row that was measured and is whole: left out")
            return
    try:
        record = model.model_validate(wanted, context=notes)
    except ValidationError as error:
        found.problems.append(f"{path} is damaged ({_reason(error)}): left out")
        return
    _name_damage(path, notes, found)
    name, again = _short(path.with_suffix("")), 2
    while name in target:
        name, again = f"{_short(path.with_suffix(''))} ({again})", again + 1
    target[name] = record


def _rows(path: Path, rows: Any, model: Any, found: ReportInputs) -> Iterator[Any]:
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        named = isinstance(row, dict) and isinstance(row.get("name"), str)
        name, notes = f"row {number}" + (f", {row['name'][:100]}," if named else ""), list[str]()
        if named and model is Row and "median_s" not in row:
            reason = row.get("error") or "the run was stopped before its turn"
            found.problems.append(f"{path}: {name} was not measured: {str(reason)[:300]}")
            continue
        try:
            yield model.model_validate(row, context=notes)
        except ValidationError as error:
            found.problems.append(f"{path}: {name} is damaged ({_reason(error)}): left out")
            continue
        _name_damage(f"{path}: {name}", notes, found)
        if row.get("error"):
            found.problems.append(f"{path}: {name} was measured in part: {str(row['error'])[:300]}")


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:100]
    return f"{place}: {first['msg']}" if place else first["msg"]


def _name_damage(where: object, fields: list[str], found: ReportInputs) -> None:
    if fields:
        found.problems.append(f"{where}: damaged and left out: {', '.join(dict.fromkeys(fields))}")


def _short(path: Path) -> str:
    """The last part of a path's name, which says enough and gives no folder of a machine away."""
    return printable(path.resolve().name)
