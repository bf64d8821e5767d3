"""tools/gpu_check.sh as it runs on a GPU, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import LIMIT_S, ROOT

PARTS = ("exactness", "7b_16_layers", "1b", "60m", "7b_replay", "350m", "1b_strategies")


def check(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["tools/gpu_check.sh", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=4 * LIMIT_S,
        check=False,
    )


@pytest.mark.long
def test_every_part_runs_and_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = check("--dry", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    for name in PARTS:
        record = json.loads((out / f"{name}.json").read_text())
        assert record["complete"]
        assert all("median_s" in row for row in record["rows"]), name
    assert "all rows have the same bits" in (out / "exactness.txt").read_text()
    table = (out / "table.md").read_text()
    for name in PARTS:
        assert f"## {name}" in table
    assert "MFU, whole attention" in table
    assert (out / "report.html").exists()


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    done = check("--dry", str(tmp_path / "out"), PYTHON="false")
    assert done.returncode == 1
    failed = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == [*["compile"] * 4, "gpu_tests", *PARTS, "report"]
    assert f"failed: {' '.join(failed)}; the logs are in {tmp_path / 'out'}" in done.stdout


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    for options, message in (((str(tmp_path),), f"{tmp_path} exists already: give a new folder"), ((), "0 folders")):
        done = check(*options)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = check("--dry", str(tmp_path / "out"), PARTS="1b 7b")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PARTS has 7b, but the parts are: compile")
    assert not (tmp_path / "out").exists()
