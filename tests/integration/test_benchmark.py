"""The benchmark as a user starts it, on real worlds of one and two ranks."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import LIMIT_S, ROOT, TINY, start


def test_rows_of_every_kind_in_one_run(tmp_path: Path) -> None:
    options = [f"--{key}={value}" for key, value in TINY.items()]
    rows = [
        "one:",
        "two x2: --training.micro_batch_size 1 --parallel.tensor_model_parallel_size 2",
        "refused: --model.rank 0",
        "three: --training.micro_batch_size 3",  # a batch of four does not divide: only its process finds out
    ]
    target = tmp_path / "benchmark.json"
    command = [*options, *(f"--row={row}" for row in rows), "--repeats=2", "--warm-up=1", f"--json={target}"]
    done = start(command, program="tools/benchmark.py")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads(target.read_text())
    one, two, refused, three = record["rows"]
    assert record["complete"]
    assert record["peak_source"].startswith("best of")
    for row in (one, two):
        assert len(row["seconds"]) == 2
        assert row["tokens_per_s"] > 0
        assert 0 < row["mfu"] < 1
        assert math.isfinite(row["loss"])
    # ZeRO-0 in fp32: moments are twice the weights, gradients once
    assert one["memory"]["weights"] == 4 * one["parameters"]
    # and a few tensors of single values; the split is the simulation's
    assert 0 <= one["memory"]["optimizer"] - 8 * one["parameters"] < 4096
    assert 0 <= one["memory"]["gradients"] - 4 * one["parameters"] < 4096
    assert two["memory"]["weights"] < one["memory"]["weights"]
    assert one["traffic"] == {}
    assert sum(size for kind, size in two["traffic"].items() if kind.startswith("TP")) > 0
    assert [len(row["ranks"]) for row in (one, two)] == [1, 2]
    # tensor-parallel ranks share one rank's products; what they send adds up
    assert [rank["operations"] * 2 for rank in two["ranks"]] == [one["ranks"][0]["operations"]] * 2
    assert sum(sum(rank["traffic"].values()) for rank in two["ranks"]) == sum(two["traffic"].values())
    assert one["step"]["fingerprint"] != two["step"]["fingerprint"]
    assert "model.rank is 0" in refused["error"]
    assert "global_batch_size" in three["error"]
    assert done.stdout.count("not measured") == 2


def test_rows_alone_have_the_same_bits_or_are_named(tmp_path: Path) -> None:
    options = [f"--{key}={value}" for key, value in TINY.items()]
    rows = ["none:", "replay: --recompute.strategy replay", "other: --training.seed 7"]
    target = tmp_path / "benchmark.json"
    command = [*options, *(f"--row={row}" for row in rows), "--repeats=2", "--alone", "--same-bits", f"--json={target}"]
    done = start(command, program="tools/benchmark.py")
    assert done.returncode == 1, done.stderr
    assert "other bits than none: other\n" in done.stderr
    none, replay, other = json.loads(target.read_text())["rows"]
    assert len(none["losses"]) == len(none["grad_norms"]) == 2
    assert (none["losses"], none["grad_norms"]) == (replay["losses"], replay["grad_norms"])
    assert none["grad_norms"] != other["grad_norms"]
    assert none["step"]["fingerprint"] != replay["step"]["fingerprint"]


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    done = start(["--config=examples/quickstart.yaml", "--row=nonsense"], program="tools/benchmark.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --row is 'nonsense'")


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:  # ends when the process does
        if text in line:
            return
    raise AssertionError(f"no line with {text!r}")


@pytest.mark.long
def test_a_row_may_die_and_a_stop_keeps_what_was_measured(tmp_path: Path) -> None:
    target = tmp_path / "benchmark.json"
    options = [f"--{key}={value}" for key, value in TINY.items()]
    rows = ["--row=one:", "--row=other: --model.rank 4", "--repeats=1000000", "--warm-up=1", f"--json={target}"]
    command = [sys.executable, "tools/benchmark.py", *options, *rows]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, "repeat 1 of")
        (server,) = [p for p in psutil.Process(process.pid).children() if "forkserver" in " ".join(p.cmdline())]
        ranks = server.children()
        assert len(ranks) == 2
        ranks[-1].kill()
        wait_for(process, "cannot be measured")
        wait_for(process, "repeat")
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "stopped by SIGINT" in errors
    assert "Traceback" not in errors
    record = json.loads(target.read_text())
    assert not record["complete"]
    whole = [row for row in record["rows"] if row["error"] is None]
    assert len(whole) == 1
    assert whole[0]["tokens_per_s"] > 0
    assert "repeats: the process of rank 0 ended by itself" in printed
    assert not any(rank.is_running() for rank in ranks)
