"""Figures are refused a place before they are measured, and are written whole."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_crnet.utils.errors import ConfigError
from megatron_crnet.utils.record_file import STDOUT, check_record_file, report_record

ROOT = Path(__file__).parents[3]
QUICKSTART = ("--config", "examples/quickstart.yaml")
TOOLS: dict[str, tuple[str, ...]] = {
    "benchmark": QUICKSTART,
    "benchmark_decoding": QUICKSTART,
    "benchmark_preprocess": (),
    "measure_communication": QUICKSTART,
    "measure_glue": QUICKSTART,
    "measure_recompute": QUICKSTART,
}


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_refuses_before_it_measures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "absent" / "found.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *TOOLS[name], "--json", str(target)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"tools/{name}.py", run_name="__main__")
    printed, errors = capsys.readouterr()
    assert ended.value.code == 2
    assert printed == ""
    assert errors == (
        f"error: --json {target} lies in a folder that does not exist: make {target.parent}, or choose another\n"
    )


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    check_record_file(None)
    check_record_file(tmp_path / "new.json")
    with pytest.raises(ConfigError, match="is a folder: write a file's name"):
        check_record_file(tmp_path)
    with pytest.raises(ConfigError, match=f"^--output {tmp_path} is a folder"):
        check_record_file(tmp_path, "--output")


@pytest.mark.fault("M10")
def test_an_older_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    target.write_text("{}")
    with pytest.raises(ConfigError, match="exists already: remove it, choose another name, or add --overwrite"):
        check_record_file(target)
    check_record_file(target, overwrite=True)


@pytest.mark.fault("M10")
@pytest.mark.parametrize("name", [*TOOLS, "plan"])
def test_every_tool_asks_before_it_replaces_its_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "found.json"
    target.write_text("mine")
    option = ("--gpus", "1", "--output") if name == "plan" else ("--json",)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *TOOLS.get(name, QUICKSTART), *option, str(target)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"tools/{name}.py", run_name="__main__")
    printed, errors = capsys.readouterr()
    assert (ended.value.code, printed, errors.count("\n")) == (2, "", 1)
    assert "exists already" in errors
    assert target.read_text() == "mine"


def test_figures_replace_older_ones_only_when_they_are_whole(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    report_record(target, {"kind": "old"}, "a table")
    with pytest.raises(TypeError):
        report_record(target, {"kind": object()}, "a table")
    assert json.loads(target.read_text()) == {"kind": "old"}
    report_record(target, {"kind": "new"}, "a table")
    assert json.loads(target.read_text()) == {"kind": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_figures_are_printed_instead_of_the_table_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    check_record_file(STDOUT)
    report_record(STDOUT, {"kind": "new"}, "a table")
    assert json.loads(capsys.readouterr().out) == {"kind": "new"}
    report_record(None, {"kind": "new"}, "a table")
    assert capsys.readouterr().out == "a table\n"
