"""The processes of one row of a benchmark: they train, wait for word, and answer with times and bytes.

Each row has processes of its own, so that rows of any layout are alive side by side and no row's memory hides in
another's. What waits for its turn does not compute.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections import Counter
from contextlib import suppress
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
class Held:
    """Bytes of one rank, at the peak of a step. On CPUs bytes of tensors that are alive; on GPUs the allocator's.

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
class Ready:
    """What a rank says when it has built its model and counted one step.

    Attributes:
        traffic: bytes of this rank's calls by group and kind, as in `planning/communication.py`.
        operations: of matrix products and attention, recomputation included, as PyTorch's counter counts them.
    """

    held: Held
    traffic: dict[str, int]
    operations: int


@dataclass(frozen=True)
class Timed:
    """One step of a rank: seconds by the clock and of its processor, and the loss."""

    seconds: float
    cpu_seconds: float
    loss: float


class RowFailed(Exception):  # noqa: N818 - it is no error of the benchmark
    """A row that cannot be measured; the message is for its line in the table."""


class World:
    """The processes of one row, as the benchmark sees them."""

    def __init__(self, config: Config, processes: int, threads: int) -> None:
        context = mp.get_context("spawn")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
        port = self._store.port if self._store is not None else 0
        self._processes, self._ends = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(theirs, config, rank, processes, port, threads), daemon=True
            )
            with signals_held_back():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(ours)

    def ready(self) -> list[Ready]:
        """Wait until all ranks have built and counted; by rank."""
        return self._answers()

    def step(self) -> list[Timed]:
        """One training step of all ranks; by rank."""
        for end in self._ends:
            with suppress(OSError):  # a process that is gone shows in the answers
                end.send(STEP)
        return self._answers()

    def _answers(self) -> list[Any]:
        """One from each rank; the first error ends the row, because the other ranks may wait for that one."""
        found: dict[int, Any] = {}
        while len(found) < len(self._ends):
            for end in wait([end for rank, end in enumerate(self._ends) if rank not in found]):
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    found[rank] = self._ends[rank].recv()
                except (EOFError, OSError):
                    found[rank] = f"the process of rank {rank} ended by itself{self._status(rank)}"
                if isinstance(found[rank], str):
                    self.close()
                    raise RowFailed(found[rank])
        return [found[rank] for rank in range(len(self._ends))]

    def _status(self, rank: int) -> str:
        self._processes[rank].join(timeout=5)
        status = self._processes[rank].exitcode
        return "" if status is None else f" with status {status} (a negative one is the signal, -9 often out of memory)"

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            with suppress(OSError):
                end.send(END)
        for process in self._processes:
            process.kill()
            process.join()


def _rank_main(connection: Connection, config: Config, rank: int, processes: int, port: int, threads: int) -> None:
    leave_signals_to_parent()
    os.dup2(2, 1)  # standard output is the table's
    torch.set_num_threads(threads)
    if processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    status = 0
    try:
        _serve(connection, config)
    except EOFError:
        pass  # the benchmark is gone
    except Exception as error:
        status = error.exit_status if isinstance(error, CrnetError) else 1
        name = "" if isinstance(error, CrnetError) else f"{type(error).__name__}: "
        connection.send(name + " ".join(str(error).split())[:500])
    os._exit(status)  # no rank may wait for the others on its way out


def _serve(connection: Connection, config: Config) -> None:
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    site = _Site(config)
    connection.send(site.counted())
    while connection.recv() == STEP:
        connection.send(site.timed())


class _Site:
    """A rank with its engine and its part of a batch of random tokens."""

    def __init__(self, config: Config) -> None:
        from megatron_crnet.config.batch import plan_batches
        from megatron_crnet.distributed.launcher import read_launch
        from megatron_crnet.distributed.process_groups import initialize_parallel
        from megatron_crnet.engine.engine import TrainEngine
        from megatron_crnet.model.gpt import build_model_chunks

        self.plan = plan_batches(config, read_launch().world_size)
        self.memory = _memory()
        with self.memory:
            self.context = initialize_parallel(config)
            self.engine = TrainEngine(config, build_model_chunks(config), self.context)
        self.batches = self._random_batches(config)

    def _random_batches(self, config: Config) -> list[dict[str, torch.Tensor]]:
        # ranks that share a replica read the same tokens
        generator = torch.Generator().manual_seed(config.training.seed + self.context.dp_rank)
        shape, device = (self.plan.micro_batch_size, self.plan.seq_length), self.context.device
        batches = []
        for _ in range(self.plan.num_microbatches):
            text = torch.randint(config.model.vocab_size, (shape[0], shape[1] + 1), generator=generator).to(device)
            batches.append(
                {
                    "tokens": text[:, :-1].contiguous(),
                    "labels": text[:, 1:].contiguous(),
                    "position_ids": torch.arange(shape[1], device=device).expand(shape).contiguous(),
                    "loss_mask": torch.ones(shape, device=device),
                }
            )
        return batches

    def _passes(self) -> float:
        return self.engine.forward_backward(self.batches, self.plan.tokens_per_step)

    def counted(self) -> Ready:
        """Two steps, of which the second is watched: the first one allocates what stays."""
        from megatron_crnet.engine.schedule import loss_totals
        from megatron_crnet.planning.communication import CommunicationCounter
        from megatron_crnet.planning.counted_step import OperationCounter, flows, state_bytes

        counter, operations, memory = CommunicationCounter(), OperationCounter(), self.memory
        with memory:
            self._passes()
            self.engine.update()
            memory.reset_peak()
            with counter, operations:
                results = self.engine.accumulate(self.batches, self.plan.tokens_per_step)
                after_passes = memory.current
                weights, optimizer, buffers = state_bytes(self.engine)
                self.engine.reduce_gradients()
                loss_totals(results, self.context.device)
                self.engine.update()
        gradients = max(after_passes - weights - optimizer - buffers, 0)
        held = Held(weights, optimizer, gradients, max(memory.peak - weights - optimizer - gradients, 0))
        traffic: Counter[str] = Counter()
        for flow in flows(counter):
            traffic[f"{flow.group} {flow.kind}"] += flow.bytes
        return Ready(held, dict(traffic), operations.total)

    def timed(self) -> Timed:
        """One step by the clock."""
        torch.cuda.synchronize()  # without a GPU it does nothing: cpu_platform
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = self._passes()
        self.engine.update()
        torch.cuda.synchronize()
        return Timed(time.perf_counter() - started, time.process_time() - cpu_started, loss)


class _CudaMemory:
    """CUDA's allocator with the face of `LiveMemory`."""

    def __enter__(self) -> _CudaMemory:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def current(self) -> int:
        return int(torch.cuda.memory_allocated())

    @property
    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def _memory() -> Any:
    from megatron_crnet.planning.live_memory import LiveMemory

    return _CudaMemory() if torch.cuda.is_available() else LiveMemory()
