"""The ranks of one world, each a process on this host that answers the process which started it.

Idle ranks block on a pipe, so that several worlds may be alive side by side.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron_crnet.utils.errors import CrnetError, describe
from megatron_crnet.utils.signals import leave_signals_to_parent, signals_held_back

Program = Callable[..., Iterator[Any]]
TRAINING = ("megatron_crnet.training.trainer", "torch.utils.tensorboard", "matplotlib.backends.backend_agg")
"""To preload for programs that train."""


class RankError(CrnetError):
    """A rank failed or ended, and its world with it."""

    exit_status = 2


class RankGroup:
    """Starts the ranks of a world.

    Args:
        program: what each rank runs, a generator function; its first value is the first answer, the next ones
            those to `ask`.
        arguments: of the program.
        threads: of each rank; None leaves PyTorch's choice.
        port: where rank 0 listens; None lets this process hold the ranks' store, as an agent does.
        preload: modules that are imported once, in a process that the ranks are forked from.
    """

    def __init__(
        self,
        program: Program,
        *arguments: Any,
        processes: int = 1,
        threads: int | None = 1,
        port: int | None = None,
        preload: tuple[str, ...] = (),
    ) -> None:
        context: Any = mp.get_context("forkserver" if preload else "spawn")
        if preload:
            context.set_forkserver_preload([*preload])
        variables = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        if port is None and processes > 1:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port, variables["TORCHELASTIC_USE_AGENT_STORE"] = self._store.port, "True"
        self._processes, self._pipes = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            arguments_of_rank = (theirs, own if port else {}, threads, program, arguments)
            process = context.Process(target=_rank_main, args=arguments_of_rank, daemon=True)
            with signals_held_back():
                process.start()
            theirs.close()  # else the end of a rank that died would not be seen
            self._processes.append(process)
            self._pipes.append(ours)

    def ask(self) -> list[Any]:
        """The next answer of each rank, which all work at once."""
        for pipe in self._pipes:
            with suppress(OSError):  # a process that is gone shows in the answers
                pipe.send(None)
        return self.answers()

    def answers(self) -> list[Any]:
        """The answers that are due, by rank.

        Raises:
            RankError: a rank failed; all are ended, because the others may wait for it.
        """
        found: dict[int, Any] = {}
        while len(found) < len(self._pipes):
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in found]):
                rank = self._pipes.index(pipe)
                try:
                    found[rank] = self._pipes[rank].recv()
                except (EOFError, OSError):
                    self._processes[rank].join(timeout=5)
                    found[rank] = (
                        f"the process of rank {rank} ended by itself with status {self._processes[rank].exitcode} (a "
                        "negative one is the signal, -9 often out of memory)"
                    )
                if isinstance(found[rank], str):
                    self.close()
                    raise RankError(found[rank])
        return [found[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _rank_main(
    pipe: Connection, variables: dict[str, str], threads: int | None, program: Program, arguments: tuple[Any, ...]
) -> None:
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    os.dup2(2, 1)  # standard output is for the figures
    os.environ.update(variables)
    if threads is not None:
        torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError):  # the process that started this one is gone
        try:
            from megatron_crnet.distributed import cpu_backend

            cpu_backend.install()
            for answer in program(*arguments):
                pipe.send(answer)
                pipe.recv()
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            pipe.send(describe(error))
            pipe.recv()  # ended by its parent
    os._exit(1)  # no rank may wait for the others at its end


def _end_with_parent() -> None:
    """End this process when the one that started it has ended: it holds a device, or a run that may start again."""
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
