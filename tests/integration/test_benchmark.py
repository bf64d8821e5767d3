"""The benchmark as a user starts it, on real worlds of one and two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.integration.conftest import TINY, start


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
    # weights twice: they, and ZeRO-0's moments; nothing of it is estimated
    assert one["memory"]["weights"] == 4 * one["parameters"]
    assert one["memory"]["optimizer"] >= 8 * one["parameters"]
    assert one["memory"]["gradients"] == 4 * one["parameters"]
    assert two["memory"]["weights"] < one["memory"]["weights"]
    assert one["traffic"] == {}
    assert sum(size for kind, size in two["traffic"].items() if kind.startswith("TP")) > 0
    assert "rank 0" in refused["error"]
    assert "global_batch_size" in three["error"]
    assert done.stdout.count("not measured") == 2


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    done = start(["--row=nonsense"], program="tools/benchmark.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --row is 'nonsense'")
