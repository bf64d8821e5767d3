"""A tool that is called without a model says how it is used, and does not work on one that nobody named."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_crnet.cli.simulate import Progress

ROOT = Path(__file__).parents[2]
TOOLS = ("benchmark", "estimate", "measure_communication", "measure_recompute", "plan", "simulate")


def ended(tool: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"tools/{tool}.py", run_name="__main__")
    return int(end.value.code or 0)


@pytest.mark.fault("M10")
@pytest.mark.parametrize("arguments", [[], ["--training.seq_length", "64"], ["--config", os.devnull]])
@pytest.mark.parametrize("tool", TOOLS)
def test_without_a_model_a_tool_says_in_one_line_how_to_give_one(
    tool: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(tool, arguments, monkeypatch) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    call = f"tools/{tool}.py --config FILE, such as examples/quickstart.yaml"
    assert errors.startswith("error: no model is given: write ")
    assert errors.endswith(f"{call}, or see --help\n")
    assert errors.count("\n") == 1


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


@pytest.mark.fault("section-5")
@pytest.mark.parametrize(
    ("options", "verdict"),
    [([], "fits: "), (["--training.micro_batch_size", "64", "--training.global_batch_size", "512"], "DOES NOT FIT: ")],
)
def test_the_verdict_of_an_estimate_is_its_first_line(
    options: list[str], verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "examples/llama2_7b.yaml", "--world-size", "8", "--gpu", "h100", *options]
    assert ended("estimate", arguments, monkeypatch) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(verdict)
    assert "tokens/s on 8 (MFU " in first
    assert " 150,000 steps in " in first
    assert len(first) <= 120


@pytest.mark.fault("section-5")
def test_the_verdict_of_a_plan_is_its_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plan.yaml"
    arguments = ["--config", "examples/quickstart.yaml", "--gpus", "1", "--output", str(target)]
    assert ended("plan", arguments, monkeypatch) == 0
    assert capsys.readouterr().out.startswith("fits: ")
    assert target.exists()


@pytest.mark.fault("M11")
def test_a_simulation_says_how_far_it_is() -> None:
    progress = Progress()
    assert progress.line(12.0) == "building the model: 12 s"
    progress.count(1, 4)
    assert progress.line(20.0) == "pass 1 of 4 of two steps, 20 s; time left not known yet"
    progress.count(3, 4)
    assert re.fullmatch(r"pass 3 of 4 of two steps, 30 s; about 0\.\d s left", progress.line(30.0))


@pytest.mark.fault("F11")
@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("benchmark_preprocess", ["--corpus", "absent.jsonl"], "absent.jsonl is neither a file nor a folder"),
        ("benchmark_preprocess", ["--corpus", "README.md"], "README.md:1 is not a JSON object"),
        ("benchmark_preprocess", ["--repeats", "0"], "benchmark.repeats is 0, but must be above 0"),
        ("benchmark_preprocess", ["--copies", "2", "0"], "benchmark.copies is 0, but must be above 0"),
        (
            "benchmark_decoding",
            ["--config", "examples/quickstart.yaml", "--threads", "0"],
            "benchmark.threads is 0, but must be above 0",
        ),
    ],
)
def test_a_benchmark_that_cannot_be_made_is_one_line(
    tool: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(tool, arguments, monkeypatch) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
