"""Ranks that are started, watched and found as processes, without waiting for their end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.forked import Program, variables_of
from tests.integration.conftest import LIMIT_S, ROOT

Process = subprocess.Popen[str] | Program


def start_rank(rank: int, port: int, options: list[str], folder: Path = ROOT) -> Program:
    """One of two ranks without a launcher that would end the others.

    Args:
        folder: relative paths are below it.
    """
    return Program("pretrain_crnet.py", options, folder, variables_of(rank, 2, port))


def start_agent(options: list[str]) -> subprocess.Popen[str]:
    """Two ranks under the agent, whose output is that of all of them, with their own imports and seeds of `hash`."""
    command = [sys.executable, "tools/launch.py", "--standalone", "--nproc_per_node=2", "pretrain_crnet.py", *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_so_far(output: Path, key: str) -> dict[int, float]:
    """A metric by step of a run that is still writing, or was killed: its last line may be cut."""
    path = output / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def last_step(output: Path) -> int:
    """The newest step that such a run has reported, 0 before the first."""
    return max(lines_so_far(output, "loss"), default=0)


def wait_until(condition: Callable[[], object], processes: Sequence[Process]) -> None:
    """Wait for a condition; fails when a process ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def wait_for_step(output: Path, step: int, processes: Sequence[Process]) -> None:
    wait_until(lambda: last_step(output) >= step, processes)


def rank_below(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The training process of a rank that a launcher started; the first, where it has children of its own.

    Raises:
        StopIteration: there is none.
    """

    def is_rank(below: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # ended since it was listed, or a zombie, which has no environment
            return below.environ().get("RANK") == str(rank)
        return False

    return next(filter(is_rank, psutil.Process(process.pid).children(recursive=True)))
