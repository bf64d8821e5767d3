from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from megatron_crnet.config import Config, LoggingConfig
from megatron_crnet.metrics import MetricsWriter, peak_memory_bytes
from megatron_crnet.plot import plot_loss


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
