"""Measures rows of configurations in one run: warm-up, repeated steps in a drawn order, medians and ratios.

One repeat runs one step of every row, so that a busy machine slows all alike. Rows are compared by the median of the
ratios within repeats.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import torch

from megatron_crnet.config.deepspeed import zero_stage
from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.launcher import keep_launch_order
from megatron_crnet.planning.machines import machine_of_gpu
from megatron_crnet.reporting.benchmark_rows import Row
from megatron_crnet.reporting.rank_group import RankError, RankGroup
from megatron_crnet.reporting.step_identity import identify_step
from megatron_crnet.reporting.training_rank import StepTiming, WorkerReady, benchmark_rank
from megatron_crnet.utils.environment import machine, versions
from megatron_crnet.utils.errors import CrnetError, require_positive
from megatron_crnet.utils.progress import format_duration

PRODUCT = 1024
"""Rows and columns of the matrix products that measure the peak."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """How to measure.

    Attributes:
        repeats: measured steps of each row.
        warm_up: steps of each row before them.
        threads: of each process.
        seed: of the order of rows.
        peak_flops: of one device, operations per second; None takes the data sheet of a GPU that is known, and else
            measures it by matrix products.
        alone: measure one row after another, where the device cannot hold all of them at once.
        counts: count operations and traffic, in a step that runs each operation by itself.
    """

    repeats: int = 10
    warm_up: int = 2
    threads: int = 1
    seed: int = 0
    peak_flops: float | None = None
    alone: bool = False
    counts: bool = True

    def __post_init__(self) -> None:
        require_positive("benchmark", repeats=self.repeats, warm_up=self.warm_up, threads=self.threads)
        if self.peak_flops is not None:
            require_positive("benchmark", peak_tflops=self.peak_flops / 1e12)


@dataclass
class Candidate:
    """A row to be measured: its configuration and ranks, what they answered, or why it cannot be measured.

    Attributes:
        twin: an earlier row with the same configuration, which is measured for both.
    """

    row: Row
    config: Config | None = None
    ranks: RankGroup | None = None
    ready: list[WorkerReady] = field(default_factory=list)
    steps: list[list[StepTiming]] = field(default_factory=list)
    error: str | None = None
    twin: Candidate | None = None

    @property
    def source(self) -> Candidate:
        """The row that is really measured."""
        return self.twin or self

    @property
    def tokens(self) -> int:
        """Of a step."""
        assert self.config is not None
        return self.config.training.global_batch_size * self.config.training.seq_length

    def ask(self, question: Callable[[RankGroup], list[Any]], say: Callable[[str], None]) -> list[Any]:
        """All ranks' answers; empty where the row has failed, now or before."""
        if self.ranks is None:
            return []
        try:
            return question(self.ranks)
        except RankError as failure:
            self.error, self.ranks = str(failure), None
            say(f"{self.row.name} cannot be measured: {failure}")
            return []


def measure(
    rows: Sequence[Row],
    options: Sequence[str],
    plan: BenchmarkPlan,
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
    measured = [c for c in candidates if c.config is not None and c.twin is None]
    sheet, source = _data_sheet(before["gpus"], measured)
    if plan.peak_flops is not None:
        sheet, source = plan.peak_flops, "given"
    steps = _Steps(plan, sheet is None, say, stopped)
    try:
        peak = steps.one_by_one(measured) if plan.alone else steps.side_by_side(measured)
    finally:
        for candidate in measured:
            if candidate.ranks is not None:
                candidate.ranks.close()
    return {
        "kind": "benchmark",
        "complete": all(len(c.steps) == plan.repeats for c in measured if c.error is None),
        "machine": {**before, "load_average_at_end": machine()["load_average"]},
        "versions": versions(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "plan": asdict(plan),
        "peak_flops": sheet or peak,
        "peak_source": source,
        "rows": _records(candidates, sheet or peak),
    }


def _data_sheet(gpus: list[str], measured: list[Candidate]) -> tuple[float | None, str]:
    """Operations per second of the GPU in the precision of the first row, and where the figure is from; or None."""
    card, configs = machine_of_gpu(gpus[0]) if gpus else None, [c.config for c in measured if c.config is not None]
    if card is None or not configs:
        return None, f"best of {PRODUCT} x {PRODUCT} matrix products on this device"
    dtype = configs[0].training.dtype
    return card.peak(dtype), f"data sheet of {card.name}, {dtype}"


@dataclass(frozen=True)
class _Steps:
    """Takes the steps of rows; each way returns the best rate of matrix products seen, operations per second."""

    plan: BenchmarkPlan
    measures_peak: bool
    say: Callable[[str], None]
    stopped: Callable[[], bool]

    def side_by_side(self, measured: list[Candidate]) -> float:
        """All rows are built before the first step."""
        self.say(f"starting the processes of {len(measured)} rows")
        for candidate in measured:
            self._start(candidate)
        for number, candidate in enumerate(measured, 1):
            if self.stopped():
                break
            candidate.ready = candidate.ask(RankGroup.answers, self.say)
            if candidate.ready:
                self.say(f"{number} of {len(measured)} ready: {candidate.row.name}")
        return self._repeat(measured)

    def one_by_one(self, measured: list[Candidate]) -> float:
        """All steps of a row before the next is built, whose process imports the libraries meanwhile."""
        peak = 0.0
        for candidate, following in zip_longest(measured, measured[1:]):
            if self.stopped():
                break
            for row in (candidate, following):
                if row is not None and row.ranks is None:
                    self._start(row)
            candidate.ask(RankGroup.answers, self.say)
            candidate.ready = candidate.ask(RankGroup.ask, self.say)
            if candidate.ready and candidate.ranks is not None:
                self.say(f"alone: {candidate.row.name}")
                peak = max(peak, self._repeat([candidate]))
            if candidate.ranks is not None:
                candidate.ranks.close()
        return peak

    def _start(self, candidate: Candidate) -> None:
        # with CUDA the libraries ask for devices when they are imported, after which a fork cannot use them
        preload = () if torch.cuda.is_available() else ("megatron_crnet.engine.engine",)
        assert candidate.config is not None
        with patch.dict(os.environ):
            keep_launch_order(candidate.config.parallel.tensor_model_parallel_size)  # of the processes that start here
            candidate.ranks = RankGroup(
                benchmark_rank,
                candidate.config,
                self.plan.alone,
                self.plan.counts,
                processes=candidate.row.processes,
                threads=self.plan.threads,
                preload=preload,
            )

    def _repeat(self, measured: list[Candidate]) -> float:
        """Step all rows in turn."""
        plan, order, peak, started = self.plan, random.Random(self.plan.seed), 0.0, time.monotonic()
        for repeat in range(-plan.warm_up, plan.repeats):
            if self.measures_peak:
                peak = max(peak, _matmul_rate(measured, plan.threads))
            for candidate in order.sample(measured, len(measured)):
                if self.stopped():
                    return peak
                times = candidate.ask(RankGroup.ask, self.say)
                if times and repeat >= 0:
                    candidate.steps.append(times)
            done, left = repeat + plan.warm_up + 1, plan.repeats - repeat - 1
            time_left = format_duration((time.monotonic() - started) * left / done)
            self.say(
                f"{f'repeat {repeat + 1} of {plan.repeats}' if repeat >= 0 else 'warm-up'}, about {time_left} left"
            )
        return peak


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


def _matmul_rate(measured: list[Candidate], threads: int) -> float:
    """Operations per second of a few matrix products, in the precision of the first row."""
    bf16 = any(c.config is not None and c.config.training.bf16 for c in measured[:1])
    cuda = torch.cuda.is_available()
    torch.set_num_threads(threads)
    size = 8 * PRODUCT if cuda else PRODUCT
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _records(candidates: list[Candidate], peak: float) -> list[dict[str, Any]]:
    firsts: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.source.steps:
            firsts.setdefault(candidate.row.sweep, candidate.source)
    return [_record(c, firsts.get(c.row.sweep), peak) for c in candidates]


def _record(candidate: Candidate, first: Candidate | None, peak: float) -> dict[str, Any]:
    """One row as JSON; without figures where it failed or its turn never came."""
    row, source = candidate.row, candidate.source
    identity = {"sweep": row.sweep, "name": row.name, "processes": row.processes, "overrides": list(row.overrides)}
    record = {**identity, "error": source.error}
    if candidate.config is not None:
        record |= _facts(candidate.config, row.processes)
        record["tokens_per_step"] = candidate.tokens
    if source.ready:
        record |= _counts(source.ready)
    if source.steps and first is not None:
        record |= _speeds(source, record, peak)
        record["speed_of_first"] = _ratio(source, first, seconds)
        record["cpu_speed_of_first"] = _ratio(source, first, cpu_seconds)
    return record


def _facts(config: Config, processes: int) -> dict[str, Any]:
    parallel, training = config.parallel, config.training
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
        "micro_batch_size": training.micro_batch_size,
    }


def _counts(ready: list[WorkerReady]) -> dict[str, Any]:
    """Memory of the fullest rank and what all ranks send together; beside these the figures of every rank."""
    fullest = max((rank.memory for rank in ready), key=lambda memory: sum(memory.values()))
    traffic: Counter[str] = Counter()
    for rank in ready:
        traffic.update(rank.traffic)
    counts = {"memory": fullest, "peak_bytes": sum(fullest.values()), "traffic": dict(sorted(traffic.items()))}
    ranks = [asdict(rank) for rank in ready]
    return {**counts, "ranks": [{k: v for k, v in rank.items() if v is not None} for rank in ranks]}


def seconds(step: list[StepTiming]) -> float:
    """Of the slowest rank."""
    return max(rank.seconds for rank in step)


def cpu_seconds(step: list[StepTiming]) -> float:
    """Of the processors of all ranks."""
    return sum(rank.cpu_seconds for rank in step)


def _speeds(source: Candidate, facts: dict[str, Any], peak: float) -> dict[str, Any]:
    times = [seconds(step) for step in source.steps]
    median = statistics.median(times)
    tokens_per_device = source.tokens / median / source.row.processes
    mfu, whole = (
        tokens_per_device * facts[key] / peak if peak else None
        for key in ("flops_per_token", "flops_per_token_whole_attention")
    )
    return {
        "seconds": times,
        "cpu_seconds": [cpu_seconds(step) for step in source.steps],
        "median_s": median,
        "spread": (max(times) - min(times)) / median,
        "tokens_per_s": source.tokens / median,
        "tflops_per_device": tokens_per_device * facts["flops_per_token"] / 1e12,
        "mfu": mfu,
        "mfu_whole_attention": whole,
        "loss": source.steps[-1][-1].loss,
        "losses": [step[-1].loss for step in source.steps],
        "grad_norms": [step[-1].grad_norm for step in source.steps],
    }


def _ratio(source: Candidate, first: Candidate, time_of: Callable[[list[StepTiming]], float]) -> float:
    """Tokens per second in units of the first row's: the median over repeats that both have done."""
    pairs = zip(source.steps, first.steps, strict=False)  # a stop leaves some a step behind
    return statistics.median(source.tokens * time_of(theirs) / (first.tokens * time_of(ours)) for ours, theirs in pairs)
