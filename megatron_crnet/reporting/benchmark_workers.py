"""The processes of one row of a benchmark: they train when told to, and answer with times and bytes.

Each row has processes of its own, so that rows of any layout are alive side by side and no row's memory hides in
another's. Idle workers block on a pipe.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import CrnetError
from megatron_crnet.utils.signals import leave_signals_to_parent, signals_held_back

STEP, END = "step", "end"


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one rank at the peak of a step: on CPUs of tensors that are alive, on GPUs the allocator's.

    Attributes:
        weights: parameters.
        optimizer: fp32 weights and moments.
        gradients: what else is there after the passes, before they are reduced, but for buffers of communication.
        activations: the rest of the peak: activations, logits, those buffers, temporary tensors.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True)
class WorkerReady:
    """A rank has built its model and counted one step.

    Attributes:
        traffic: bytes of this rank's calls by group and kind, as in docs/parallelism.md.
        operations: of matrix products and attention, recomputation included, as PyTorch's counter counts them.
    """

    memory: PeakMemory
    traffic: dict[str, int]
    operations: int


@dataclass(frozen=True)
class StepTiming:
    """One step of a rank: wall-clock seconds, seconds of its processor, and the loss."""

    seconds: float
    cpu_seconds: float
    loss: float


class RowFailed(Exception):  # noqa: N818 - the benchmark itself goes on
    """A row that cannot be measured; the message is for its line in the table."""


class WorkerGroup:
    """The processes of one row, as the benchmark sees them."""

    def __init__(self, config: Config, processes: int, threads: int) -> None:
        context = mp.get_context("spawn")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
        port = self._store.port if self._store is not None else 0
        self._processes, self._pipes = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            arguments = (theirs, config, rank, processes, port, threads)
            process = context.Process(target=_worker_main, args=arguments, daemon=True)
            with signals_held_back():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def ready(self) -> list[WorkerReady]:
        """Wait until all ranks have built and counted; by rank."""
        return self._answers()

    def step(self) -> list[StepTiming]:
        """One training step of all ranks; by rank."""
        self._send(STEP)
        return self._answers()

    def close(self) -> None:
        """End the processes."""
        self._send(END)
        for process in self._processes:
            process.kill()
            process.join()

    def _send(self, word: str) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # a process that is gone shows in the answers
                pipe.send(word)

    def _answers(self) -> list[Any]:
        """One from each rank; the first error ends the row, because the other ranks may wait for that one."""
        found: dict[int, Any] = {}
        while len(found) < len(self._pipes):
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in found]):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    found[rank] = self._pipes[rank].recv()
                except (EOFError, OSError):
                    found[rank] = f"the process of rank {rank} ended by itself{self._status(rank)}"
                if isinstance(found[rank], str):
                    self.close()
                    raise RowFailed(found[rank])
        return [found[rank] for rank in range(len(self._pipes))]

    def _status(self, rank: int) -> str:
        self._processes[rank].join(timeout=5)
        status = self._processes[rank].exitcode
        return "" if status is None else f" with status {status} (a negative one is the signal, -9 often out of memory)"


def _worker_main(pipe: Connection, config: Config, rank: int, processes: int, port: int, threads: int) -> None:
    leave_signals_to_parent()
    os.dup2(2, 1)  # standard output is the table's
    torch.set_num_threads(threads)
    if processes > 1:
        mine, size = str(rank), str(processes)
        os.environ.update(RANK=mine, LOCAL_RANK=mine, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    status = 0
    try:
        worker = _Worker(config)
        pipe.send(worker.counted())
        while pipe.recv() == STEP:
            pipe.send(worker.timed())
    except EOFError:
        pass  # the benchmark is gone
    except Exception as error:
        status = error.exit_status if isinstance(error, CrnetError) else 1
        name = "" if isinstance(error, CrnetError) else f"{type(error).__name__}: "
        pipe.send(name + " ".join(str(error).split())[:500])
    os._exit(status)  # no rank may wait for the others at its end


class _Worker:
    """A rank with its engine and its part of a batch of random tokens."""

    def __init__(self, config: Config) -> None:
        from megatron_crnet.config.batch import plan_batches
        from megatron_crnet.distributed import cpu_backend
        from megatron_crnet.distributed.launcher import read_launch
        from megatron_crnet.distributed.process_groups import initialize_parallel
        from megatron_crnet.engine.engine import TrainEngine
        from megatron_crnet.model.gpt import build_model_chunks
        from megatron_crnet.planning.counters import LiveMemory

        cpu_backend.install()
        self.plan = plan_batches(config, read_launch().world_size)
        self.memory: Any = _AllocatorMemory() if torch.cuda.is_available() else LiveMemory()
        with self.memory:
            self.context = initialize_parallel(config)
            self.engine = TrainEngine(config, build_model_chunks(config), self.context)
        # ranks that share a replica read the same tokens
        generator = torch.Generator().manual_seed(config.training.seed + self.context.dp_rank)
        count = self.plan.num_microbatches
        self.batches = [self._random_batch(config.model.vocab_size, generator) for _ in range(count)]

    def _random_batch(self, vocab_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        shape, device = (self.plan.micro_batch_size, self.plan.seq_length), self.context.device
        text = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator).to(device)
        return {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "position_ids": torch.arange(shape[1], device=device).expand(shape).contiguous(),
            "loss_mask": torch.ones(shape, device=device),
        }

    def _step(self) -> float:
        loss = self.engine.forward_backward(self.batches, self.plan.tokens_per_step)
        self.engine.update()
        return loss

    def counted(self) -> WorkerReady:
        """Two steps, of which the second is watched: the first one allocates what stays."""
        from megatron_crnet.engine.schedule import loss_totals
        from megatron_crnet.planning.counted_step import comm_volumes, state_bytes
        from megatron_crnet.planning.counters import CommunicationCounter, OperationCounter

        counter, operations, memory = CommunicationCounter(), OperationCounter(), self.memory
        with memory:
            self._step()
            memory.reset_peak()
            with counter, operations:
                results = self.engine.accumulate(self.batches, self.plan.tokens_per_step)
                after_passes = memory.current
                weights, optimizer, buffers = state_bytes(self.engine)
                self.engine.reduce_gradients()
                loss_totals(results, self.context.device)
                self.engine.update()
        gradients = max(after_passes - weights - optimizer - buffers, 0)
        peak = PeakMemory(weights, optimizer, gradients, max(memory.peak - weights - optimizer - gradients, 0))
        traffic: Counter[str] = Counter()
        for flow in comm_volumes(counter):
            traffic[f"{flow.group} {flow.kind}"] += flow.bytes
        return WorkerReady(peak, dict(traffic), operations.total)

    def timed(self) -> StepTiming:
        """One step by the clock."""
        torch.cuda.synchronize()  # without a GPU it does nothing: cpu_backend
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = self._step()
        torch.cuda.synchronize()
        return StepTiming(time.perf_counter() - started, time.process_time() - cpu_started, loss)


class _AllocatorMemory(nullcontext[None]):
    """CUDA's allocator with the interface of `LiveMemory`."""

    current = property(lambda _: torch.cuda.memory_allocated())
    peak = property(lambda _: torch.cuda.max_memory_allocated())
    reset_peak = staticmethod(torch.cuda.reset_peak_memory_stats)
