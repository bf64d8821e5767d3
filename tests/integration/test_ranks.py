"""Several ranks through the real entry point: they agree before they start, and notice who is missing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_crnet.config.loading import read_config, save_resolved
from tests.forked import Program
from tests.integration.conftest import LIMIT_S, ROOT, Corpus
from tests.integration.processes import start_rank, wait_for_step
from tests.ports import free_ports


def error_of(process: Program) -> str:
    _, printed = process.communicate(timeout=LIMIT_S)
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    assert len(errors) == 1, printed
    return errors[0]


def test_another_configuration_on_one_rank_stops_all_and_names_it(corpus: Corpus, tmp_path: Path) -> None:
    port, output = free_ports(1), tmp_path / "run"
    changed = corpus.options(output, optimizer__lr=0.5)
    ranks = [start_rank(rank, port, options) for rank, options in enumerate([corpus.options(output), changed])]
    errors = [error_of(process) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("has optimizer.lr" in error and "0.5" in error for error in errors)
    assert not output.exists()


def copy_of(prefix: Path, folder: Path) -> None:
    """A .bin/.idx pair as `text` in a folder."""
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", folder / f"text{suffix}")


def test_data_that_one_rank_does_not_see_stops_all_and_names_it(corpus: Corpus, tmp_path: Path) -> None:
    """As on disks that are not shared: each rank looks for the same relative path in a folder of its own."""
    copy_of(corpus.train, tmp_path / "0")
    (tmp_path / "1").mkdir()
    port, output = free_ports(1), tmp_path / "run"
    options = corpus.options(output, data__train_data_path="[text]")
    ranks = [start_rank(rank, port, options, tmp_path / str(rank)) for rank in range(2)]
    errors = [error_of(process) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "rank 1 failed" in errors[0]
    assert all("text" in error for error in errors)
    assert not output.exists()


def test_another_layout_on_one_rank_stops_all_before_it_builds_groups(corpus: Corpus, tmp_path: Path) -> None:
    port, output = free_ports(1), tmp_path / "run"
    options = [corpus.options(output, parallel__tensor_model_parallel_size=size) for size in (1, 2)]
    ranks = [start_rank(rank, port, options[rank]) for rank in range(2)]
    errors = [error_of(process) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("has parallel.tensor_model_parallel_size 2, but the others have 1" in error for error in errors)


def test_other_contents_under_the_same_path_stop_all(corpus: Corpus, tmp_path: Path) -> None:
    for rank, prefix in enumerate((corpus.train, corpus.valid)):
        copy_of(prefix, tmp_path / str(rank))
    port, options = free_ports(1), corpus.options(tmp_path / "run", data__train_data_path="[text]")
    ranks = [start_rank(rank, port, options, tmp_path / str(rank)) for rank in range(2)]
    errors = [error_of(process) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("rank 1 has contents of the data" in error for error in errors)


def test_a_checkpoint_that_one_rank_does_not_see_stops_all(corpus: Corpus, tmp_path: Path) -> None:
    port, options = free_ports(1), corpus.options(tmp_path / "run", checkpoint__dir="saved")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    checkpoint = tmp_path / "0" / "saved" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    save_resolved(read_config(options), checkpoint / "config.yaml")
    ranks = [start_rank(rank, port, options, tmp_path / str(rank)) for rank in range(2)]
    errors = [error_of(process) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("rank 1 has the checkpoint (none), but the others have step_00000003" in error for error in errors)
    assert all("a folder that all ranks share" in error for error in errors)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "rank 1 of 2 did not arrive"), (1, "rank 0 or the launcher did not answer at 127.0.0.1:")],
)
def test_a_rank_that_never_starts_is_named(rank: int, message: str, corpus: Corpus, tmp_path: Path) -> None:
    options = corpus.options(tmp_path / "run", parallel__distributed_timeout_minutes=0.03)
    process = start_rank(rank, free_ports(1), options)
    error = error_of(process)
    assert process.returncode == 4
    assert message in error
    assert "within parallel.distributed_timeout_minutes 0.03" in error


def test_an_error_that_nobody_foresaw_ends_the_rank_at_once() -> None:
    """A thread that goes on, as that of a collective call would, must not keep the process."""
    program = """
import runpy, sys, threading, time
from megatron_crnet.config import loading
sys.argv += ["--config", "examples/quickstart.yaml"]
threading.Thread(target=time.sleep, args=(3600,)).start()
def fail(*_):
    raise ZeroDivisionError("nobody foresaw this")
loading.ConfigParser.read = fail
runpy.run_path("pretrain_crnet.py", run_name="__main__")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("ZeroDivisionError: nobody foresaw this\n")


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "gone: rank 1"), (signal.SIGSTOP, "gone: rank 1")], ids=["dies", "stands"]
)
def test_a_rank_that_dies_or_stands_still_does_not_leave_the_other_hanging(
    number: signal.Signals, message: str, corpus: Corpus, tmp_path: Path
) -> None:
    port, output = free_ports(1), tmp_path / "run"
    options = corpus.options(output, training__train_steps=100000, parallel__distributed_timeout_minutes=0.15)
    ranks = [start_rank(rank, port, options) for rank in range(2)]
    try:
        wait_for_step(output, 3, ranks)
        ranks[1].send_signal(number)
        error = error_of(ranks[0])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 4
    assert message in error
    assert "this is rank 0 at step" in error
    stacks = output / "stacks" / "rank_00000.txt"
    assert error.endswith(f"{stacks} holds the stacks of its threads")
    assert "training/trainer.py" in stacks.read_text()
    assert "in _train" in stacks.read_text()
