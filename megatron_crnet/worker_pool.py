"""Runs jobs in worker processes and gives the results in the order of the jobs.

The standard library's pools wait for ever when a worker is killed while a large message is on its way.
Here every worker has a socket of its own, served by one thread: a dead worker closes it and is noticed at
once, and a dead parent closes all, which ends the workers. A worker is a fresh interpreter that imports
what its task needs and nothing of the program that started it, such as torch.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_crnet.errors import CrnetError

AHEAD = 16
"""Results that may wait for their turn, beyond those in work: the reader's pauses do not reach the workers."""
WORKER_PROGRAM = "import sys; from megatron_crnet.worker_pool import serve; serve(int(sys.argv[1]))"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""The workers are the parallelism: the libraries in them start no threads of their own."""

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection


@dataclass(frozen=True)
class _Failure:
    """An exception that this code does not expect, as text."""

    trace: str


@contextmanager
def ordered_map(
    workers: int, jobs: Iterable[Job], make_task: Callable[..., Callable[[Job], Result]], *arguments: Any
) -> Iterator[Iterator[Result]]:
    """Give an iterator over the results of `jobs`; 0 workers run them in this process."""
    if workers == 0:
        yield map(make_task(*arguments), jobs)
        return
    with OrderedPool(workers, make_task, *arguments) as pool:
        yield pool.map(jobs)


class OrderedPool(Generic[Job, Result]):
    """Worker processes that all run `make_task(*arguments)`, a function from a job to a result.

    Args:
        workers: number of processes.
        make_task: called once in every worker; like `arguments`, jobs and results it travels by pickle, so it
            must be importable, which a function of the main program is not.
    """

    def __init__(self, workers: int, make_task: Callable[..., Callable[[Job], Result]], *arguments: Any) -> None:
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)
        for _ in range(workers):
            worker = _start_worker()
            self._workers.append(worker)
            worker.pipe.send((make_task, arguments))
            self._idle.put(worker)

    def __enter__(self) -> OrderedPool[Job, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.wait()
            worker.pipe.close()

    def map(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield the result of every job, in the jobs' order; a few jobs are taken ahead.

        Raises:
            CrnetError: a worker raised it, or a worker died.
            RuntimeError: a worker raised anything else; the message holds its traceback.
        """
        pending: deque[Future[Result]] = deque()
        for job in jobs:
            pending.append(self._threads.submit(self._ask, job))
            if len(pending) >= AHEAD + 2 * len(self._workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _ask(self, job: Job) -> Result:
        worker = self._idle.get()
        try:
            worker.pipe.send(job)
            reply = worker.pipe.recv()
        except (EOFError, OSError) as error:
            raise CrnetError(
                f"worker process {worker.process.pid} ended with exit code {worker.process.wait()} before its work was "
                "done: if it was killed for want of memory, use fewer workers"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(reply, CrnetError):
            raise reply
        if isinstance(reply, _Failure):
            raise RuntimeError(f"a worker process failed:\n{reply.trace}")
        result: Result = reply
        return result


def _start_worker() -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER_PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    return _Worker(process, Connection(ours.detach()))


def serve(descriptor: int) -> None:
    """A worker's life: make the task, then answer jobs until the parent's end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with suppress(EOFError, OSError), Connection(descriptor) as pipe:
        make_task, arguments = pipe.recv()
        task: Callable[[Any], Any] | None = None
        while True:
            job = pipe.recv()
            try:
                task = task or make_task(*arguments)
                reply = task(job)
            except CrnetError as error:
                reply = error
            except Exception:
                reply = _Failure(traceback.format_exc())
            pipe.send(reply)
