from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from megatron_crnet.config.schema import Config, LoggingConfig
from megatron_crnet.training.metrics import MetricsWriter, peak_memory_bytes, plot_loss
from megatron_crnet.training.progress import Progress


def _config(folder: Path) -> Config:
    return dataclasses.replace(Config(), logging=LoggingConfig(output_dir=str(folder)))


def test_lines_of_steps_that_are_done_again_are_replaced(tmp_path: Path) -> None:
    with MetricsWriter(_config(tmp_path), is_main=True) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')  # a crash in the middle of a line
    with MetricsWriter(_config(tmp_path), is_main=True, start_step=2) as writer:
        writer.write(3, {"loss": 30.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(_config(tmp_path), is_main=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_the_picture_is_drawn_from_the_lines(tmp_path: Path) -> None:
    lines = [{"step": 1, "tokens": 10, "loss": 3.0}, {"step": 1, "tokens": 10, "validation_loss": 3.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ste')
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="a run", unigram_entropy=4.0)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_peak_memory_is_at_least_what_a_process_with_torch_needs() -> None:
    assert peak_memory_bytes() > 50e6


def advance(progress: Progress, step: int) -> None:
    values = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 10.0, "step_time_s": 2.0}
    progress.advance(step, values)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("megatron_crnet.training.progress.time.monotonic", lambda: now[0])
    return now


@pytest.mark.fault("M11")
def test_from_the_first_step_on_a_line_says_when_the_run_will_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(12, 0, is_main=True)
    clock[0] += 7  # the start-up
    advance(progress, 1)
    clock[0] += 2
    advance(progress, 2)
    clock[0] += 9 * 2
    advance(progress, 11)
    found = [line.rpartition("ETA ")[2] for line in capsys.readouterr().out.splitlines()]
    assert found == ["under 1 min 17 s", "20 s", "2.0 s"]


@pytest.mark.fault("M11")
def test_a_step_that_is_not_logged_is_told_when_nothing_was_said_for_long(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(1000, 0, is_main=True)
    for step in range(1, 61):
        clock[0] += 2
        progress.advance(step, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 3/1000 | ETA 33 min 14 s"
    assert 3 <= len(lines) <= 6  # rarer and rarer


@pytest.mark.fault("M11")
def test_lines_are_printed_during_a_long_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_crnet.training.progress.FIRST_LINE_SECONDS", 0.05)
    monkeypatch.setattr("megatron_crnet.training.progress.CHECK_SECONDS", 0.02)
    with Progress(3, 0, is_main=True) as progress, Progress(3, 0, is_main=False):
        time.sleep(0.3)
    count = capsys.readouterr().out.count("since step 0/3 | ETA ?\n")
    assert 1 <= count <= 5
    progress.close()
