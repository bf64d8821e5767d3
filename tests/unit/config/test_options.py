from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.config.loading import read_config
from megatron_crnet.config.options import ToolParser, file_path, positive_integer
from megatron_crnet.utils.errors import ConfigError

ROOT = Path(__file__).parents[3]
TOOLS = [ROOT / "pretrain_crnet.py", *sorted((ROOT / "tools").glob("*.py"))]
WITHOUT_OPTIONS = ("check_imports",)
ON_CONFIGURATIONS = ("estimate", "simulate", "plan", "measure_recompute", "measure_communication", "benchmark")


def start(tool: Path, *argv: str, monkeypatch: Any) -> int:
    """The exit status of a tool that is started as a program, in this process."""
    monkeypatch.setattr(sys, "argv", [str(tool), *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("tool", [t for t in TOOLS if t.stem not in WITHOUT_OPTIONS], ids=lambda tool: tool.stem)
def test_every_tool_names_its_versions(tool: Path, monkeypatch: Any, capsys: Any) -> None:
    assert start(tool, "--version", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("megatron_crnet ")
    assert printed.out.count("\n") == 1


@pytest.mark.fault("M1", "L9")
@pytest.mark.parametrize("name", ON_CONFIGURATIONS)
def test_every_tool_that_takes_a_configuration_refuses_as_training_does(
    name: str, monkeypatch: Any, capsys: Any
) -> None:
    wrong = ["--config", str(ROOT / "examples/quickstart.yaml"), "--optimizer.lr", ".inf"]
    own = ["--gpus", "8"] if name == "plan" else []
    assert start(ROOT / "tools" / f"{name}.py", *wrong, *own, monkeypatch=monkeypatch) == 2
    with pytest.raises(ConfigError) as refused:
        read_config(wrong)
    assert capsys.readouterr().err == f"error: {refused.value}\n"


def test_options_of_training_alone_are_unknown_to_tools() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --dry-run"):
        read_config(["--dry-run"])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1048577", "9" * 5000, "\u00b2"])
def test_a_count_of_a_tool_has_a_range(text: str) -> None:
    with pytest.raises(ConfigError, match="must be an integer above 0, at most 1048576: correct it"):
        positive_integer("--gpus", text)


@pytest.mark.fault("L11")
def test_paths_of_tools_stand_for_what_they_do_in_the_configuration(monkeypatch: Any) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    parser = ToolParser(description="a tool")
    parser.add_argument("--json", type=Path)
    assert parser.parse_args(["--json=~/x.json"]).json == Path("/home/me/x.json")
    assert file_path("--output", "$SCRATCH/plan.yaml") == Path("/scratch/me/plan.yaml")
    for wrong in ("$UNSET_X/a", "x" * 300, "a\0b", ""):
        with pytest.raises(ConfigError, match=r"argument --json: it is .*: correct the command line, or see --help"):
            parser.parse_args([f"--json={wrong}"])
        with pytest.raises(ConfigError, match="--output is "):
            file_path("--output", wrong)
