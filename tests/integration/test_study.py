"""`crnet study` as it is typed: rows of runs that end well and badly, a killed study that goes on, several at once."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_crnet.cli.main import main
from megatron_crnet.config.loading import read_config
from megatron_crnet.utils.files import read_json_lines
from tests.forked import Program, forking
from tests.integration.conftest import LIMIT_S, ROOT, Corpus
from tests.integration.processes import wait_until

Study = Callable[..., tuple[int, str, str]]


@pytest.fixture
def study(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Study:
    """Runs `crnet study` in this process. Returns its status and what it printed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is put back
    forking()

    def call(file: Path, output: Path, *options: str) -> tuple[int, str, str]:
        status = main(["study", str(file), "--output", str(output), *options])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def file(corpus: Corpus, tmp_path: Path) -> Path:
    base = tmp_path / "base.yaml"
    base.write_text(json.dumps(dataclasses.asdict(read_config(corpus.options(tmp_path / "unused")))))
    path = tmp_path / "small.yaml"
    axes = {"model.variant": ["crnet", "cola"], "optimizer.lr": [0.001, 0.01]}
    path.write_text(json.dumps({"base": str(base), "axes": axes}))
    return path


def losses(output: Path) -> dict[str, float]:
    path = output / "results.jsonl"
    rows = read_json_lines(path) if path.exists() else []
    return {json.dumps(row["settings"]): row["validation_loss"] for row in rows}


def test_runs_end_with_a_study_that_is_killed(file: Path, tmp_path: Path) -> None:
    hours = {**json.loads(file.read_text()), "axes": {"training.train_steps": [2, 10**5]}}
    file.write_text(json.dumps(hours))
    command = [sys.executable, "tools/study.py", str(file), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_until(lambda: losses(tmp_path / "out"), [process])
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=LIMIT_S)
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.long
def test_a_killed_study_goes_on_to_the_results_of_one_that_was_not(file: Path, tmp_path: Path, study: Study) -> None:
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "axes": {"model.variant": ["crnet", "cola", "low_rank"]}})
    )
    status, table, errors = study(file, tmp_path / "whole", "--processes", "2")
    assert status == 0, errors
    assert len(table.splitlines()) == 2 + 3
    output = tmp_path / "killed"
    for done, number in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = Program("tools/study.py", [str(file), "--output", str(output)])
        wait_until(lambda rows=done + 1: len(losses(output)) >= rows, [process])
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == (75 if number == signal.SIGTERM else -number), errors
        assert psutil.wait_procs(children, timeout=60)[1] == []
    status, table, errors = study(file, output)
    assert status == 0, errors
    rows = read_json_lines(output / "results.jsonl")
    assert len(rows) == 3, "each once"
    assert losses(output) == losses(tmp_path / "whole")
    assert all(row["status"] == "complete" and row["versions"]["torch"] and row["config"]["model"] for row in rows)
    assert all(Path(row["run"], "metrics.jsonl").is_file() for row in rows)
    assert not list(output.glob("runs/*/checkpoints"))
    assert study(file, output, "--show")[:2] == (0, table)


def test_a_run_that_fails_or_diverges_is_a_row_with_the_reason(file: Path, tmp_path: Path, study: Study) -> None:
    given = json.loads(file.read_text())
    tokenizer = json.loads(Path(given["base"]).read_text())["data"]["tokenizer_model"]
    axes = {"data.tokenizer_model": [tokenizer, "README.md"], "faults.spike_deviations": [1000, 1e-20]}
    file.write_text(json.dumps({**given, "axes": axes, "options": {"faults.spike_window": 2, "optimizer.lr": 0.1}}))
    status, table, errors = study(file, tmp_path / "out")
    assert status == 0, errors
    found = {tuple(row["settings"].values()): row for row in read_json_lines(tmp_path / "out/results.jsonl")}
    assert found[tokenizer, 1000]["status"] == "complete"
    assert found[tokenizer, 1e-20]["status"] == "diverged"
    assert "but faults.spike_deviations 1e-20 above" in found[tokenizer, 1e-20]["reason"]
    assert found[tokenizer, 1e-20]["reason"].endswith(")"), "no word on states that the study removes"
    assert found["README.md", 1000]["status"] == "failed"
    assert "README.md" in found["README.md", 1000]["reason"]
    assert table.count("1 diverged") == 1
    assert table.count("1 failed") == 2
    assert study(file, tmp_path / "out")[:2] == (0, table), "they are not repeated"
    lines = len(read_json_lines(tmp_path / "out/results.jsonl"))
    assert study(file, tmp_path / "out", "--retry")[:2] == (0, table)
    assert len(read_json_lines(tmp_path / "out/results.jsonl")) == lines + 2


def test_a_mistake_is_one_line_before_the_first_run(file: Path, tmp_path: Path, study: Study) -> None:
    output = tmp_path / "out"
    given = json.loads(file.read_text())
    for changes, message in (
        ({"axes": {"optimizer.rate": [1]}}, f"error: {file}: unknown key optimizer.rate"),
        ({"axes": {"optimizer.lr": []}}, f"error: {file}: axes.optimizer.lr has no values"),
        ({"options": {"data.train_data_path": ["absent"]}}, "error: absent.bin"),
    ):
        file.write_text(json.dumps({**given, **changes}))
        status, _, errors = study(file, output)
        assert status == 2
        assert errors.startswith(message)
        assert errors.count("\n") == 1
    assert not output.exists()
