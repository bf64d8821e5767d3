"""A tool that is called without a model says how it is used, and does not work on one that nobody named."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("benchmark", "estimate", "measure_communication", "measure_recompute", "plan", "simulate")


def ended(tool: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"tools/{tool}.py", run_name="__main__")
    return int(end.value.code or 0)


@pytest.mark.fault("M10")
@pytest.mark.parametrize("arguments", [[], ["--training.seq_length", "64"]])
@pytest.mark.parametrize("tool", TOOLS)
def test_without_a_model_a_tool_prints_its_usage(
    tool: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(tool, arguments, monkeypatch) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert f"tools/{tool}.py --config" in errors
    assert errors.endswith("error: no model is named: add --config FILE, such as examples/quickstart.yaml\n")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_no_mistake(tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(tool, ["--help"], monkeypatch) == 0
    assert f"tools/{tool}.py" in capsys.readouterr().out


@pytest.mark.fault("M11")
@pytest.mark.parametrize(
    "tool", [*TOOLS, "generate", "evaluate", "convert_checkpoint", "scaling_report", "compare_runs"]
)
def test_what_takes_seconds_to_import_comes_after_ctrl_c_is_one_line(
    tool: str,
) -> None:
    """`reported` turns Ctrl-C into a line; what a tool imports before it, it cannot."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='imported');"
        "print(*({'torch', 'deepspeed', 'megatron', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"tools/{tool}.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
