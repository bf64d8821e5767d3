"""Ranks that are started, watched and found as processes, without waiting for their end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.integration.conftest import ROOT, lines_of
from tests.ports import free_ports


def start_rank(
    rank: int, port: int, options: list[str], folder: Path = ROOT, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """One of two ranks without a launcher that would end the others; relative paths are below `folder`."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "pretrain_crnet.py"), *options]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


def start_agent(options: list[str]) -> subprocess.Popen[str]:
    """Two ranks under the agent, whose output is that of all of them."""
    command = [sys.executable, "tools/launch.py", "--standalone", "--nproc_per_node=2", "pretrain_crnet.py", *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    """One of tests/ports.py."""
    return free_ports(1)


def wait_for_step(output: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or step not in lines_of(output, "loss"):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


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
