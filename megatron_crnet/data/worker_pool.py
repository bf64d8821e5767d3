"""Runs jobs in worker processes and gives the results in the order of the jobs.

The standard library's pools wait for ever when a worker is killed while a large message is on its way.
Here every worker has a pipe of its own, served by one thread: a dead worker closes it and is noticed at
once, and a dead parent closes all, which ends the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_crnet.utils.errors import CrnetError

AHEAD = 16
"""Results that may wait for their turn, beyond those in work: the reader's pauses do not reach the workers."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""The workers are the parallelism: the libraries in them start no threads of their own."""

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Worker:
    process: ForkProcess
    pipe: Connection


@dataclass(frozen=True)
class _Failure:
    """An exception that this code does not expect, as text."""

    trace: str


@contextmanager
def ordered_map(workers: int, jobs: Iterable[Job], task: Callable[[Job], Result]) -> Iterator[Iterator[Result]]:
    """Give an iterator over `task` of each of `jobs`; 0 workers do the work in this process."""
    if workers == 0:
        yield map(task, jobs)
        return
    with OrderedPool(workers, task) as pool:
        yield pool.map(jobs)


class OrderedPool(Generic[Job, Result]):
    """Worker processes that all run `task`, a function from a job to a result.

    The workers are forked, so they start in milliseconds and inherit what `task` refers to; fresh interpreters
    would spend seconds on importing what a Hugging Face tokenizer needs. As in every fork of a process with
    threads, `task` must not need a lock that another thread may hold. Jobs and results travel by pickle.

    Args:
        workers: number of processes.
        task: the work.
    """

    def __init__(self, workers: int, task: Callable[[Job], Result]) -> None:
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)  # its threads start with the first job, after the forks
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [ours, *(worker.pipe for worker in self._workers)]
            process = context.Process(target=_serve, args=(theirs, inherited, task), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
            self._idle.put(self._workers[-1])

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
            worker.process.join()
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
            worker.process.join()
            raise CrnetError(
                f"worker process {worker.process.pid} ended with exit code {worker.process.exitcode} before its work "
                "was done: if it was killed for want of memory, use fewer workers"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(reply, CrnetError):
            raise reply
        if isinstance(reply, _Failure):
            raise RuntimeError(f"a worker process failed:\n{reply.trace}")
        result: Result = reply
        return result


def _serve(pipe: Connection, inherited: list[Connection], task: Callable[[Any], Any]) -> None:
    """A worker's life: answer jobs until the parent's end closes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler would unwind the parent's stack here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ.update(ONE_THREAD)
    for parents_end in inherited:  # held open here, they would keep the workers alive after the parent
        parents_end.close()
    with suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            try:
                reply = task(job)
            except CrnetError as error:
                reply = error
            except Exception:
                reply = _Failure(traceback.format_exc())
            pipe.send(reply)
