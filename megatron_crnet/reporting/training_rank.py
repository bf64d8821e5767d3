"""What a rank of a `RankGroup` does to be measured: training steps on random tokens, counted and timed."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_crnet.config.schema import Config

if TYPE_CHECKING:
    from megatron_crnet.model.weights import Weight


@dataclass(frozen=True)
class WorkerReady:
    """A rank has built its model and counted one step.

    Attributes:
        memory: bytes at the peak of a step by part: on CPUs of tensors that are alive, on GPUs the allocator's.
        traffic: bytes of this rank's calls by group and kind, as in docs/parallelism.md.
        operations: of matrix products and attention, recomputation included, as PyTorch's counter counts them; None
            where nothing was counted.
    """

    memory: dict[str, int]
    traffic: dict[str, int]
    operations: int | None


@dataclass(frozen=True)
class StepTiming:
    """One step of a rank: wall-clock seconds, seconds of its processor, the loss and the gradients' norm."""

    seconds: float
    cpu_seconds: float
    loss: float
    grad_norm: float


def benchmark_rank(
    config: Config, waits: bool = False, counts: bool = True
) -> Iterator[WorkerReady | StepTiming | None]:
    """The program of a rank: measures memory and counts a step, then times one after another.

    Args:
        waits: answer None before anything is built, when the libraries are imported.
        counts: operations and traffic.
    """
    from megatron_crnet.engine.determinism import deterministic_algorithms

    with deterministic_algorithms(config.training.deterministic):
        if waits:
            from megatron_crnet.engine import engine  # noqa: F401

            yield None
        rank = _TrainingRank(config)
        yield rank.counted(counts)
        while True:
            yield rank.timed()


def resident_rank(config: Config) -> Iterator[dict[str, Any]]:
    """The program of a rank: resident KiB of its process before two steps and at the peak."""
    rank = _TrainingRank(config)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    rank.step()
    rank.step()
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield {"name": config.recompute.strategy, "before_kib": before, "peak_kib": peak, "seconds": seconds}


class _TrainingRank:
    """An engine and this rank's part of a batch of random tokens."""

    def __init__(self, config: Config) -> None:
        from megatron_crnet.config.batch import plan_batches
        from megatron_crnet.config.megatron import build_transformer_config
        from megatron_crnet.config.phases import with_largest_ranks
        from megatron_crnet.distributed.launcher import read_launch
        from megatron_crnet.distributed.process_groups import initialize_parallel
        from megatron_crnet.engine.distillation import build_teacher
        from megatron_crnet.engine.engine import TrainEngine
        from megatron_crnet.model.gpt import build_model_chunks
        from megatron_crnet.model.weights import initial_value
        from megatron_crnet.planning.counted_step import synthetic_batch
        from megatron_crnet.planning.counters import LiveMemory

        config = with_largest_ranks(config)
        plan = plan_batches(config, read_launch().world_size)
        self.tokens = plan.tokens_per_step
        self.memory: Any = _AllocatorMemory() if torch.cuda.is_available() else LiveMemory()
        with self.memory:
            self.context = initialize_parallel(config)
            transformer, device = build_transformer_config(config), self.context.device

            def drawn(weight: Weight) -> Tensor:
                return initial_value(weight.name, weight.shape, transformer, config.training.seed, device=device)

            chunks = build_model_chunks(config, drawn)
            self.engine = TrainEngine(config, chunks, self.context, build_teacher(config))
        # ranks that share a replica read the same tokens
        generator = torch.Generator().manual_seed(config.training.seed + self.context.dp_rank)
        batch = synthetic_batch(config, self.context.device)
        self.batches = []
        for _ in range(plan.num_microbatches):
            tokens = torch.randint(config.model.vocab_size, batch["tokens"].shape, generator=generator)
            tokens = tokens.to(self.context.device)
            self.batches.append({**batch, "tokens": tokens, "labels": tokens})

    def step(self) -> float:
        """Train. Returns the loss."""
        loss = self.engine.forward_backward(self.batches, self.tokens)
        self.engine.update()
        return loss

    def counted(self, counts: bool) -> WorkerReady:
        """A first step, which allocates what stays, and one whose memory, operations and traffic are counted.

        On CUDA memory is that of a step of its own, because while operations are counted nothing is compiled.
        """
        from megatron_crnet.planning.counted_step import comm_volumes, step_memory
        from megatron_crnet.planning.counters import CommunicationCounter, OperationCounter

        counter, operations = CommunicationCounter(), OperationCounter()
        with self.memory:
            self.step()
            work = self.engine, self.batches, self.tokens, self.memory
            if not counts:
                return WorkerReady(step_memory(*work).parts, {}, None)
            apart = step_memory(*work).parts if torch.cuda.is_available() else None
            with counter, operations:
                peak = step_memory(*work).parts
        traffic: Counter[str] = Counter()
        for flow in comm_volumes(counter):
            traffic[f"{flow.group} {flow.kind}"] += flow.bytes
        return WorkerReady(apart or peak, dict(traffic), operations.total)

    def timed(self) -> StepTiming:
        """One step by the clock."""
        torch.cuda.synchronize()  # without a GPU it does nothing: cpu_backend
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = self.step()
        torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return StepTiming(seconds, cpu_seconds, loss, self.engine.last_grad_norm or 0.0)


class _AllocatorMemory(nullcontext[None]):
    """CUDA's allocator with the interface of `LiveMemory`."""

    current = property(lambda _: torch.cuda.memory_allocated())
    peak = property(lambda _: torch.cuda.max_memory_allocated())
    reset_peak = staticmethod(torch.cuda.reset_peak_memory_stats)
