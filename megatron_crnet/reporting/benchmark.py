"""Measures rows of configurations in one run: warm-up, repeated steps in a drawn order, medians and ratios.

One repeat runs one step of every row, so that a busy machine slows all alike. What rows are compared by is the median
of the ratios within repeats.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron_crnet.config.deepspeed_rules import zero_stage
from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.reporting.benchmark_rows import Row
from megatron_crnet.reporting.benchmark_world import Ready, RowFailed, Timed, World
from megatron_crnet.reporting.step_identity import identify_step
from megatron_crnet.utils.duration import spell
from megatron_crnet.utils.environment import machine, versions
from megatron_crnet.utils.errors import CrnetError, require_positive

PRODUCT = 1024
"""Rows and columns of the matrix products that measure the peak."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        repeats: measured steps of each row.
        warm_up: steps of each row before them.
        threads: of each process.
        seed: of the order of rows.
        peak_flops: of one device, operations a second; None measures it by matrix products.
    """

    repeats: int = 10
    warm_up: int = 2
    threads: int = 1
    seed: int = 0
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        require_positive("benchmark", repeats=self.repeats, warm_up=self.warm_up, threads=self.threads)
        if self.peak_flops is not None:
            require_positive("benchmark", peak_tflops=self.peak_flops / 1e12)


@dataclass
class Candidate:
    """A row on its way: its configuration and world, what it answered, or why it cannot be measured."""

    row: Row
    config: Config | None = None
    world: World | None = None
    ready: list[Ready] = field(default_factory=list)
    steps: list[list[Timed]] = field(default_factory=list)
    error: str | None = None
    twin: Candidate | None = None
    """An earlier row with the same configuration, which is measured for both."""

    @property
    def source(self) -> Candidate:
        """The row that is really measured."""
        return self.twin or self

    def fail(self, reason: str) -> None:
        """Leave this row out from now on."""
        self.error, self.world = reason, None


def measure(
    rows: Sequence[Row],
    options: Sequence[str],
    plan: Plan,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Measure all rows; a row that fails is named and left out.

    Args:
        options: the command line's configuration, which each row's overrides follow.
        say: takes a line of progress.
        stopped: asked between steps; then the result holds what was measured so far.

    Returns:
        The record that is written as JSON.
    """
    before, candidates = machine(), _candidates(rows, options)
    measured = [c for c in candidates if c.error is None and c.twin is None]
    try:
        say(f"starting the processes of {len(measured)} rows")
        for candidate in measured:
            _start(candidate, plan)
        for number, candidate in enumerate(measured, 1):
            if stopped():
                break
            _wait_until_ready(candidate)
            say(f"{number} of {len(measured)} ready: {candidate.row.name}{_reason(candidate)}")
        peak = _repeat(measured, plan, say, stopped)
    finally:
        for candidate in measured:
            if candidate.world is not None:
                candidate.world.close()
    complete = all(len(c.steps) == plan.repeats for c in measured if c.error is None)
    return {
        "kind": "benchmark",
        "complete": complete,
        "machine": {**before, "load_average_at_end": machine()["load_average"]},
        "versions": versions(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "plan": asdict(plan),
        "peak_flops": plan.peak_flops or peak,
        "peak_source": "given" if plan.peak_flops else f"best of {PRODUCT} x {PRODUCT} matrix products on this device",
        "rows": _records(candidates, plan.peak_flops or peak),
    }


def _candidates(rows: Sequence[Row], options: Sequence[str]) -> list[Candidate]:
    found: list[Candidate] = []
    for row in rows:
        candidate = Candidate(row)
        try:
            candidate.config = row.config(options)
            same = (c for c in found if (c.config, c.row.processes) == (candidate.config, row.processes))
            candidate.twin = next((c for c in same if c.twin is None), None)
        except CrnetError as error:
            candidate.error = str(error)
        found.append(candidate)
    return found


def _start(candidate: Candidate, plan: Plan) -> None:
    assert candidate.config is not None
    candidate.world = World(candidate.config, candidate.row.processes, plan.threads)


def _wait_until_ready(candidate: Candidate) -> None:
    assert candidate.world is not None
    try:
        candidate.ready = candidate.world.ready()
    except RowFailed as failure:
        candidate.fail(str(failure))


def _reason(candidate: Candidate) -> str:
    return f" cannot be measured: {candidate.error}" if candidate.error else ""


def _repeat(measured: list[Candidate], plan: Plan, say: Callable[[str], None], stopped: Callable[[], bool]) -> float:
    """Step all rows in turn. Returns the best rate of matrix products seen, operations a second."""
    order, peak, started = random.Random(plan.seed), 0.0, time.monotonic()
    for repeat in range(-plan.warm_up, plan.repeats):
        if plan.peak_flops is None:
            peak = max(peak, _product_rate(measured, plan.threads))
        for candidate in order.sample(measured, len(measured)):
            if stopped():
                return peak
            if candidate.world is None or not candidate.ready:
                continue
            try:
                times = candidate.world.step()
            except RowFailed as failure:
                candidate.fail(str(failure))
                say(f"{candidate.row.name}{_reason(candidate)}")
                continue
            if repeat >= 0:
                candidate.steps.append(times)
        done, left = repeat + plan.warm_up + 1, plan.repeats - repeat - 1
        time_left = spell((time.monotonic() - started) * left / done)
        name = f"repeat {repeat + 1} of {plan.repeats}" if repeat >= 0 else "warm-up"
        say(f"{name}, about {time_left} left")
    return peak


def _product_rate(measured: list[Candidate], threads: int) -> float:
    """Operations a second of a few products, in the precision of the first row."""
    bf16 = any(c.config is not None and c.config.training.dtype == "bf16" for c in measured[:1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    size = PRODUCT if device == "cpu" else 8 * PRODUCT
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(4):
        _synchronize()
        started = time.perf_counter()
        a @ a
        _synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _records(candidates: list[Candidate], peak: float) -> list[dict[str, Any]]:
    firsts: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.source.steps:
            firsts.setdefault(candidate.row.sweep, candidate)
    return [_record(c, firsts.get(c.row.sweep), peak) for c in candidates]


def _record(candidate: Candidate, first: Candidate | None, peak: float) -> dict[str, Any]:
    """One row as JSON; without figures where it failed or its turn never came."""
    row, config, source = candidate.row, candidate.config, candidate.source
    record: dict[str, Any] = {
        "sweep": row.sweep,
        "name": row.name,
        "processes": row.processes,
        "overrides": list(row.overrides),
        "error": source.error,
    }
    if config is None:
        return record
    record |= _facts(config, row.processes)
    if source.ready:
        record |= _counts(source.ready)
    if source.steps:
        record |= _speeds(source, record, peak)
        assert first is not None
        record["speed_of_first"] = _ratio(source, first.source, seconds)
        record["cpu_speed_of_first"] = _ratio(source, first.source, cpu_seconds)
    return record


def _facts(config: Config, processes: int) -> dict[str, Any]:
    parallel, training, tokens = config.parallel, config.training, _tokens(config)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return {
        "step": identify_step(config, processes),
        "variant": config.model.variant,
        "recompute": config.recompute.strategy,
        "dtype": training.dtype,
        "layout": {"tp": tp, "pp": pp, "dp": processes // (tp * pp), "zero": zero_stage(config)},
        "parameters": total_parameters(config.model),
        "flops_per_token": flops_per_token(config.model, training.seq_length),
        "flops_per_token_whole_attention": flops_per_token(config.model, training.seq_length, whole_attention=True),
        "tokens_per_step": tokens,
        "micro_batch_size": training.micro_batch_size,
    }


def _tokens(config: Config) -> int:
    return config.training.global_batch_size * config.training.seq_length


def _counts(ready: list[Ready]) -> dict[str, Any]:
    """Memory of the fullest rank and what all ranks send together; beside these the figures of every rank."""
    fullest = max((rank.held for rank in ready), key=lambda held: held.total)
    kinds = sorted({kind for rank in ready for kind in rank.traffic})
    traffic = {kind: sum(rank.traffic.get(kind, 0) for rank in ready) for kind in kinds}
    ranks = [{"memory": asdict(r.held), "operations": r.operations, "traffic": r.traffic} for r in ready]
    return {"memory": asdict(fullest), "peak_bytes": fullest.total, "traffic": traffic, "ranks": ranks}


def seconds(step: list[Timed]) -> float:
    """Of the slowest rank."""
    return max(rank.seconds for rank in step)


def cpu_seconds(step: list[Timed]) -> float:
    """Of the processors of all ranks."""
    return sum(rank.cpu_seconds for rank in step)


def _speeds(source: Candidate, facts: dict[str, Any], peak: float) -> dict[str, Any]:
    times = [seconds(step) for step in source.steps]
    median = statistics.median(times)
    flops = facts["flops_per_token"] * facts["tokens_per_step"] / median / source.row.processes
    whole = facts["flops_per_token_whole_attention"] / facts["flops_per_token"]
    return {
        "seconds": times,
        "cpu_seconds": [cpu_seconds(step) for step in source.steps],
        "median_s": median,
        "spread": (max(times) - min(times)) / median,
        "tokens_per_s": facts["tokens_per_step"] / median,
        "tflops_per_device": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mfu_whole_attention": flops * whole / peak if peak else None,
        "loss": source.steps[-1][-1].loss,
    }


def _ratio(source: Candidate, first: Candidate, time_of: Callable[[list[Timed]], float]) -> float:
    """Tokens a second in units of the first row's: the median over repeats that both have done."""
    assert source.config is not None
    assert first.config is not None
    tokens = _tokens(source.config) / _tokens(first.config)
    pairs = zip(source.steps, first.steps, strict=False)  # a stop leaves some a step behind
    return statistics.median(tokens * time_of(theirs) / time_of(ours) for ours, theirs in pairs)
