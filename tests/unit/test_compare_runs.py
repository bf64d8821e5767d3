from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_crnet.config.loading import save_config
from megatron_crnet.config.schema import Config

TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


def write_run(folder: Path, loss: float, more: str = "") -> Path:
    folder.mkdir()
    save_config(Config(), folder / "config.yaml")
    lines = [{"step": 1, "tokens": 100, "loss": 8.0}, {"step": 1, "tokens": 100, "validation_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    return folder


def compare(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, folders)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.fault("section-5", "F10")
def test_runs_have_names_and_a_damaged_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = '5\n{"step": 2, "loss": ' + "9" * 400 + '}\n{"step": "\\ud800"}\n' + "[" * 100_000 + "\n"
    runs = write_run(tmp_path / "worse", 7.5, damaged), write_run(tmp_path / "better", 7.25), tmp_path / "absent"
    assert compare(monkeypatch, *runs) == 0
    printed, errors = capsys.readouterr()
    header, _, *rows = printed.splitlines()
    assert header.startswith("| run")
    assert [row.split()[1] for row in rows] == ["better", "worse"]
    assert "4 lines, the first of them 3, cannot be read" in errors
    assert "absent/metrics.jsonl cannot be read" in errors
    assert len({len(line) for line in printed.splitlines()}) == 1  # aligned
    assert len(header) <= 100


def test_nothing_to_compare_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(monkeypatch, tmp_path / "absent") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: none of the 1 runs could be read")
