"""Processes that are forked from one that has imported everything, which takes a process of its own ten seconds.

What depends on the order of a set is the same in all of them: they share one seed of `hash`.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing as mp
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

ROOT = Path(__file__).parents[1]


@cache
def forking() -> Any:
    """The context whose processes are forked. Its server starts now, before one with other imports can."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    forkserver.ensure_running()
    return context


def begin(environment: Mapping[str, str]) -> None:
    """Make a forked process one of its own: its variables, random numbers and way to start processes; one thread."""
    mp.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    numpy.random.seed()
    torch.set_num_threads(1)


def variables_of(rank: int, world_size: int, port: int | None = None) -> dict[str, str]:
    """What a launcher sets on one host."""
    own, whole = str(rank), str(world_size)
    ranks = {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": whole, "LOCAL_WORLD_SIZE": whole}
    return ranks if port is None else {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Program:
    """`python PROGRAM ARGUMENTS` under way, with the interface of `subprocess.Popen`.

    Args:
        program: path from the repository's root.
        folder: the working folder.
        variables: of the environment, beside this process's own.
        before: Python that is run first, with `patch`, a pytest.MonkeyPatch.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        folder: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        before: str = "",
    ) -> None:
        self._printed = Path(tempfile.mkdtemp())
        for name in "12":
            (self._printed / name).touch()  # it may be killed before it prints
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        call = (str(ROOT / program), [*arguments], folder, environment, before, self._printed)
        self._process = forking().Process(target=_run, args=call)
        self._process.start()
        self.pid: int = self._process.pid
        self.returncode: int | None = None
        atexit.register(self.kill)  # or this process would wait at its end for what a failed test has left

    def poll(self) -> int | None:
        """Exit status, or minus the signal that ended it; None before its end."""
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended in `timeout` seconds.
        """
        if self.returncode is None:
            self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed on both streams, once."""
        self.wait(timeout)
        output, errors = ((self._printed / name).read_text(errors="replace") for name in "12")
        shutil.rmtree(self._printed)
        self._process.close()
        atexit.unregister(self.kill)
        return output, errors

    def send_signal(self, number: signal.Signals) -> None:
        """Send it unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _run(
    program: str, arguments: list[str], folder: Path, environment: dict[str, str], before: str, printed: Path
) -> None:
    """The forked process, which multiprocessing ends with the status of a SystemExit, or with a traceback and 1."""
    for number in (1, 2):
        with (printed / str(number)).open("wb") as file:
            os.dup2(file.fileno(), number)
    # the server's own objects may be bound to other descriptors
    sys.stdout, sys.stderr = (open(n, "w", closefd=False, errors="backslashreplace") for n in (1, 2))  # noqa: SIM115
    begin(environment)
    os.chdir(folder)
    exec(before, {"patch": pytest.MonkeyPatch()})
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
