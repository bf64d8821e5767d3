"""Several ranks through the real entry point: they agree before they start, and notice who is missing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Corpus, lines_of


def start_rank(rank: int, port: int, options: list[str]) -> subprocess.Popen[str]:
    """One of two ranks without a launcher that would end the others."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "pretrain_crnet.py", *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def error_of(process: subprocess.Popen[str], timeout_s: float) -> str:
    _, printed = process.communicate(timeout=timeout_s)
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    assert len(errors) == 1, printed
    return errors[0]


def wait_for_step(output: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or step not in lines_of(output, "loss"):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_another_configuration_on_one_rank_stops_all_and_names_it(corpus: Corpus, tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "run"
    changed = corpus.options(output, optimizer__lr=0.5)
    ranks = [start_rank(rank, port, options) for rank, options in enumerate([corpus.options(output), changed])]
    errors = [error_of(process, 120) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("has optimizer.lr" in error and "0.5" in error for error in errors)
    assert not output.exists()


def test_data_that_one_rank_does_not_see_stops_all_and_names_it(corpus: Corpus, tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "run"
    changed = corpus.options(output, data__train_data_path="[absent/train]")
    ranks = [start_rank(rank, port, options) for rank, options in enumerate([corpus.options(output), changed])]
    errors = [error_of(process, 120) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "rank 1 stopped at start" in errors[0]
    assert "absent/train" in errors[0]


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "gone: rank 1"), (signal.SIGSTOP, "gone: rank 1")], ids=["dies", "stands"]
)
def test_a_rank_that_dies_or_stands_still_does_not_leave_the_other_hanging(
    number: signal.Signals, message: str, corpus: Corpus, tmp_path: Path
) -> None:
    port, output = free_port(), tmp_path / "run"
    options = corpus.options(output, training__train_steps=100000, parallel__distributed_timeout_minutes=0.15)
    ranks = [start_rank(rank, port, options) for rank in range(2)]
    try:
        wait_for_step(output, 3, ranks)
        ranks[1].send_signal(number)
        error = error_of(ranks[0], 60)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 4
    assert message in error
    assert "this is rank 0 at step" in error
