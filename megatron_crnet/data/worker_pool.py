"""Runs jobs in worker processes and yields the results in the order of the jobs.

The standard library's pools hang when a worker is killed while it sends a large message. Here every worker has a pipe
of its own, served by one thread: a dead worker closes it, which is noticed at once, and a dead parent closes all, which
ends the workers.
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
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from megatron_crnet.utils.errors import CrnetError

AHEAD = 16
"""Results that may wait for their turn, besides those in work: the reader's pauses do not reach the workers."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""The workers are the parallelism: the libraries in them start no threads of their own."""

Job = TypeVar("Job")
Result = TypeVar("Result")
_Worker = tuple[ForkProcess, Connection]


@contextmanager
def ordered_map(workers: int, jobs: Iterable[Job], task: Callable[[Job], Result]) -> Iterator[Iterator[Result]]:
    """Give an iterator over `task` of each of `jobs`, a few of which are taken ahead; 0 workers work in this process.

    The workers are forked, so they start in milliseconds and inherit what `task` refers to; fresh interpreters
    would spend seconds on importing what a Hugging Face tokenizer needs. As in every fork of a process with
    threads, `task` must not need a lock that another thread may hold. Jobs and results travel by pickle.

    Raises:
        CrnetError: by the iterator: `task` raised it, or a worker died.
        RuntimeError: by the iterator: `task` raised anything else; the message holds its traceback.
    """
    if workers == 0:
        yield map(task, jobs)
        return
    context = multiprocessing.get_context("fork")
    pool: list[_Worker] = []
    threads = ThreadPoolExecutor(workers)  # its threads start with the first job, after the forks
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [ours, *(pipe for _, pipe in pool)]
            process = context.Process(target=_serve, args=(theirs, inherited, task), daemon=True)
            process.start()
            theirs.close()
            pool.append((process, ours))
        yield _results(jobs, threads, pool)
    finally:
        for process, _ in pool:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process, pipe in pool:
            process.join()
            pipe.close()


def _results(jobs: Iterable[Any], threads: ThreadPoolExecutor, pool: list[_Worker]) -> Iterator[Any]:
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in pool:
        idle.put(worker)
    pending: deque[Future[Any]] = deque()
    for job in jobs:
        pending.append(threads.submit(_ask, idle, job))
        if len(pending) >= AHEAD + 2 * len(pool):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _ask(idle: queue.SimpleQueue[_Worker], job: Any) -> Any:
    process, pipe = worker = idle.get()
    try:
        pipe.send(job)
        reply = pipe.recv()
    except (EOFError, OSError) as error:
        process.join()
        raise CrnetError(
            f"worker process {process.pid} ended with exit code {process.exitcode} before its work was done: if it was "
            "killed for want of memory, use fewer workers"
        ) from error
    finally:
        idle.put(worker)
    if isinstance(reply, Exception):
        raise reply
    return reply


def _serve(pipe: Connection, inherited: list[Connection], task: Callable[[Any], Any]) -> None:
    """Answer jobs until the parent's end closes."""
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
                reply = RuntimeError(f"a worker process failed:\n{traceback.format_exc()}")
            pipe.send(reply)
