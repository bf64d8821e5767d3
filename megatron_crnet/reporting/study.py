"""Runs a study (`study_grid.py`): each run in a process of its own, several at once, a JSON line per finished run.

An axis with a factor is extended, for all variants alike, until the best value of each variant is inside: all get the
same grid and so the same search budget.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_crnet.checkpoint.directory import checkpoint_dir, checkpoints
from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.reporting.rank_group import TRAINING, RankError, RankGroup
from megatron_crnet.reporting.study_grid import MOST_EXTENSIONS, Axis, Run, Study, text_of
from megatron_crnet.utils.environment import machine, versions
from megatron_crnet.utils.errors import BadStepError, ConfigError, DataError, cannot_be_written, describe, require
from megatron_crnet.utils.files import read_json_lines
from megatron_crnet.utils.folder_lock import LOCK, holding
from megatron_crnet.utils.progress import format_duration

RESULTS = "results.jsonl"

Row = dict[str, Any]
Say = Callable[[str], None]


def loss_of(rows: Iterable[Row]) -> float:
    """Mean validation loss of runs that differ in their seed; infinite if one failed or there is none."""
    losses = [row["validation_loss"] if row["status"] == "complete" else math.inf for row in rows]
    return statistics.fmean(losses) if losses else math.inf


def read_rows(study: Study) -> dict[str, Row]:
    """Rows of the results so far by the key of their run; of several the last.

    Raises:
        ConfigError: they are those of another study.
    """
    path = study.output / RESULTS
    if not path.exists():
        return {}
    rows, names = {}, [axis.name for axis in study.axes]
    for row in read_json_lines(path):
        run = Run(row.get("settings", {}), row.get("seed", 0))
        differs = (
            f"axes {', '.join(run.settings)} instead of {', '.join(names)}"
            if {*run.settings} != {*names}
            else study.difference(run, row.get("config", {}))
        )
        require(
            differs is None, f"{path} holds the results of another study ({differs}): give another folder, --output"
        )
        rows[run.key] = row
    return rows


def extended(study: Study, rows: Mapping[str, Row], given: Study, say: Say = lambda _: None) -> Study:
    """The study with a value more at each end of an axis at which a variant is best.

    Args:
        given: the study of the file, from whose values at most MOST_EXTENSIONS are added on each side.
    """
    for axis, first in zip(study.axes, given.axes, strict=True):
        if axis.extend is None:
            continue
        for side, pick in ((1, max), (-1, min)):
            edge = pick(axis.values)
            variant = next((v for v, best in _best_values(study, rows, axis) if best == edge), None)
            if variant is None:
                continue
            value = float(f"{edge * axis.extend**side:.6g}")
            if all(isinstance(v, int) for v in axis.values):
                value = round(value)
            added = sum(1 for v in axis.values if (v - pick(first.values)) * side > 0)
            longer = replace(axis, values=tuple(sorted({*axis.values, value})))
            try:
                require(added < MOST_EXTENSIONS, f"{axis.name} was extended by {added} values already")
                require(value not in axis.values, f"times {axis.extend:g} it is {value} again")
                study.with_axis(longer).check()
            except ConfigError as error:
                say(f"warning: the best {axis.name} of {variant} is at the edge, {edge:g}: {error}")
                continue
            say(f"{axis.name} is extended to {value:g}: {variant} is best at the edge, {edge:g}")
            axis, study = longer, study.with_axis(longer)
    return study


def _best_values(study: Study, rows: Mapping[str, Row], axis: Axis) -> Iterator[tuple[str, Any]]:
    """Each combination of the other axes, in words, and its best value of this one; none where every run failed."""
    for name, by_value in by_variant(study, rows, axis).items():
        losses = {value: loss_of(found) for value, found in by_value.items()}
        best = min(losses, key=lambda value: losses[value])
        if math.isfinite(losses[best]):
            yield name, best


def by_variant(study: Study, rows: Mapping[str, Row], axis: Axis | None) -> dict[str, dict[Any, list[Row]]]:
    """Rows by the values of all other axes, in words, and by the value of this one."""
    found: dict[str, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run in study.runs():
        others = [
            ("" if a.name == "model.variant" else f"{a.label}=") + text_of(run.settings[a.name])
            for a in study.axes
            if a != axis
        ]
        value = None if axis is None else run.settings[axis.name]
        if run.key in rows:
            found[", ".join(others) or "all"][value].append(rows[run.key])
    return found


@dataclass
class StudyRunner:
    """Runs what is missing of a study.

    Args:
        processes: runs at once.
        threads: of each.
        retry: also repeat runs that failed, but not those that diverged.
        stopped: whether to end now; runs under way are left for the next start.
    """

    study: Study
    processes: int = 1
    threads: int = 1
    retry: bool = False
    say: Say = lambda _: None
    stopped: Callable[[], bool] = lambda: False
    _groups: set[RankGroup] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> tuple[Study, dict[str, Row]]:
        """Every run of the grid and of its extensions. Returns the study with its extended axes, and all rows.

        Raises:
            ConfigError: a run cannot be honoured, the results are those of another study, or in use.
            DataError: the folder of the study cannot be written.
        """
        self.study.check()
        try:
            self.study.output.mkdir(parents=True, exist_ok=True)
            with holding(self.study.output / LOCK, str(self.study.output)):
                return self._run_grid(read_rows(self.study))
        except OSError as error:
            raise DataError(cannot_be_written(self.study.output, error, "give another --output")) from error

    def _run_grid(self, rows: dict[str, Row]) -> tuple[Study, dict[str, Row]]:
        study, again = self.study, self.retry
        while not self.stopped():
            missing = [run for run in study.runs() if not _is_done(rows.get(run.key), again)]
            again = False
            self._run_all(missing, rows)
            longer = extended(study, rows, self.study, self.say)
            if longer == study or self.stopped():
                break
            study = longer
        return study, rows

    def _run_all(self, runs: list[Run], rows: dict[str, Row]) -> None:
        if runs:
            self.say(f"{len(runs)} runs, {self.processes} at once; {len(rows)} are done")
        with ThreadPoolExecutor(self.processes) as pool:
            pending = {pool.submit(self._one, run): run for run in runs}
            try:
                while pending and not self.stopped():
                    done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        run = pending.pop(future)
                        if (row := future.result()) is not None:
                            rows[run.key] = row
                            append_row(self.study.output / RESULTS, row)
                            self.say(_line(run, row))
            finally:
                for future in pending:
                    future.cancel()
                with self._lock:
                    for group in self._groups:
                        group.close()

    def _one(self, run: Run) -> Row | None:
        """A run's row; None if the study was stopped before its end."""
        config = self.study.config(run)
        folder = Path(config.logging.output_dir)
        if not checkpoints(checkpoint_dir(config)):  # a part of a run that cannot go on
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self.stopped():
                return None
            group = RankGroup(train_one, config, threads=self.threads, preload=TRAINING)
            self._groups.add(group)
        try:
            (outcome,) = group.answers()
        except RankError as error:
            outcome = {"status": "failed", "reason": str(error)}
        finally:
            with self._lock:
                self._groups.discard(group)
                group.close()
        if self.stopped() or outcome["status"] == "stopped":
            return None
        if not self.study.keep_checkpoints:
            shutil.rmtree(checkpoint_dir(config), ignore_errors=True)
        return {
            "kind": "study",
            "settings": run.settings,
            "seed": run.seed,
            **outcome,
            "tokens": plan_batches(config, 1).tokens_of_run(config.training.train_steps),
            "parameters": total_parameters(config.model),
            "flops_per_token": flops_per_token(config.model, config.training.seq_length),
            "run": str(folder),
            "config": resolved(config),
            "versions": versions(),
            "machine": machine(),
        }


def _is_done(row: Row | None, again: bool) -> bool:
    return row is not None and not (again and row["status"] == "failed")


def append_row(path: Path, row: Row) -> None:
    """Add a line to a file of JSON lines, after one that was cut short as well."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut = file.read(1) != b"\n"
        else:
            cut = False
        file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _line(run: Run, row: Row) -> str:
    settings = ", ".join(f"{name.partition('.')[2] or name} {text_of(value)}" for name, value in run.settings.items())
    if row["status"] != "complete":
        return f"{settings}, seed {run.seed}: {row['status']}: {row['reason']}"
    return f"{settings}, seed {run.seed}: {row['validation_loss']:.4f} ({format_duration(row['seconds'])})"


def train_one(config: Config) -> Iterator[Row]:
    """The program of a run's process: train, or go on, and say how it ended."""
    log = os.open(Path(config.logging.output_dir) / "log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from megatron_crnet.training.trainer import run_training

    started, outcome = time.perf_counter(), Row()
    try:
        result = run_training(config)
        lines = read_json_lines(Path(config.logging.output_dir) / "metrics.jsonl")
        known = {f"{kind}_loss": _last(lines, key) for kind, key in LOSSES.items()}  # of a run that was complete before
        known |= {name: loss for name in known if (loss := getattr(result, name)) is not None}
        outcome = {"status": "complete" if result.complete else "stopped", "reason": None, **known}
        outcome["curve"] = learning_curve(lines)
        if result.complete and not math.isfinite(known["validation_loss"] or math.nan):
            outcome |= {"status": "diverged", "reason": f"the validation loss is {known['validation_loss']}"}
    except BadStepError as error:
        outcome = {"status": "diverged", "reason": error.problem}  # the states are removed
    except Exception as error:
        traceback.print_exc()
        outcome = {"status": "failed", "reason": describe(error)}
    yield {**outcome, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time()}


LOSSES = {"train": "loss", "validation": "validation_loss", "test": "test_loss"}
"""Keys of metrics.jsonl."""


def learning_curve(lines: Iterable[Row]) -> list[tuple[int, float]]:
    """Tokens and validation loss of each validation in a run's metrics.jsonl; of one made again the last."""
    key = LOSSES["validation"]
    return sorted({line["tokens"]: line[key] for line in lines if key in line}.items())


def _last(lines: list[Row], key: str) -> float | None:
    return next((line[key] for line in reversed(lines) if key in line), None)
