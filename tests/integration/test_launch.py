"""The agent: its exit status is the ranks' own, and a warning is passed on."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.forked import Program
from tests.integration.conftest import LIMIT_S, start
from tests.integration.processes import wait_until

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
rank, folder, what = int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2]
def warned(number, _):
    if what == "saves":
        time.sleep(1.0)
        sys.exit(75)
if what != "deaf":
    signal.signal(signal.SIGUSR1, warned)
(folder / f"ready{rank}").touch()
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what.isdigit():
    sys.exit(int(what) if rank == 1 else 0)
time.sleep(600)
"""


def agent(folder: Path, what: str, *nodes: str) -> Program:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    options = [*(nodes or ("--standalone",)), "--nproc_per_node=2", str(program), str(folder), what]
    return Program("tools/launch.py", options)


@pytest.mark.parametrize(("what", "status"), [("0", 0), ("3", 3), ("killed", 137)])
def test_the_status_is_that_of_the_first_rank_that_failed(tmp_path: Path, what: str, status: int) -> None:
    process = agent(tmp_path, what)
    _, printed = process.communicate(timeout=LIMIT_S)
    assert process.returncode == status, printed
    assert "Traceback" not in printed
    assert ("rank 1 was ended by SIGKILL" in printed) == (what == "killed")


@pytest.mark.parametrize("what", ["saves", "deaf"], ids=["a rank that saves", "a rank that cannot take signals yet"])
def test_a_warning_reaches_the_ranks_and_their_answer_the_shell(tmp_path: Path, what: str) -> None:
    process = agent(tmp_path, what)
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)), [process])
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, printed


def test_a_warning_while_the_agent_waits_for_another_node_ends_it(tmp_path: Path) -> None:
    """Its main thread is then in a call of C++, where Python runs no handler: nobody answers it here."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(LIMIT_S)
        master = ["--master_addr=127.0.0.1", f"--master_port={other.getsockname()[1]}"]
        process = agent(tmp_path, "0", "--nnodes=2", "--node_rank=1", *master)
        connection, _ = other.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            _, printed = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, printed
    assert "SIGTERM before a rank was started: nothing to save" in printed


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = agent(tmp_path, "0", "--master_addr=127.0.0.1", f"--master_port={other.getsockname()[1]}")
        _, printed = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 2, printed
        assert printed.startswith(f"error: port {other.getsockname()[1]} of this host is in use")
        assert len(printed.splitlines()) == 1


def test_ranks_that_have_saved_are_not_started_again(tmp_path: Path) -> None:
    process = agent(tmp_path, "0", "--max_restarts=1")
    _, printed = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert printed.startswith("error: --max_restarts is 1, but ")


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ("2", ["--config", "absent.yaml"], "absent.yaml cannot be read"),
        ("2", ["--training.global_batch_size=8", "--training.micro_batch_size=8"], "training.global_batch_size 8 does"),
        ("two", [], "--nnodes is 1:1 and --nproc_per_node two, but must be numbers"),
        ("0", [], "--nnodes is 1:1 and --nproc_per_node 0, but both must be at least 1"),
    ],
)
def test_a_mistake_of_all_ranks_is_one_line(ranks: str, options: list[str], message: str) -> None:
    done = start(["--standalone", f"--nproc_per_node={ranks}", "train", *options], program="tools/launch.py")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {message}")
