"""Ctrl-C while an entry point imports its libraries, which takes seconds, is one line and a documented status."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.conftest import LIMIT_S, ROOT

# sends the signal at the very moment when a module is looked for
PROGRAM = """
import os, runpy, signal, sys
wanted, script, *arguments = sys.argv[1:]
class Finder:
    def find_spec(self, name, path=None, target=None):
        ready = hasattr(sys.modules.get("megatron_crnet.cli.main"), "ctrl_c_is_one_line")
        if name == wanted or (wanted == "any" and ready):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
ENTRY_POINTS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
CONFIG = ["--config", "examples/quickstart.yaml"]
LATER = [
    ("tools/estimate.py", "torch", CONFIG),
    ("tools/plan.py", "torch", [*CONFIG, "--gpus", "8"]),
    ("tools/simulate.py", "megatron.core", CONFIG),
    ("tools/launch.py", "torch", ["--nproc_per_node=2", "pretrain_crnet.py"]),
    ("tools/check_imports.py", "deepspeed", []),
    ("tools/evaluate.py", "torch", ["--model", "runs/none", "--text", "README.md"]),
]


def interrupted_at(module: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, module, script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.fault("M11")
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_tool_says_one_line_during_its_first_imports(name: str) -> None:
    result = interrupted_at("any", f"tools/{name}")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.fault("M11")
@pytest.mark.parametrize(("script", "module", "arguments"), LATER)
def test_a_tool_says_one_line_when_it_imports_libraries_later(script: str, module: str, arguments: list[str]) -> None:
    result = interrupted_at(module, script, *arguments)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.fault("M11")
@pytest.mark.parametrize(
    ("module", "status", "line"),
    [
        ("megatron_crnet.utils.signals", 130, "interrupted\n"),
        ("yaml", 75, "SIGINT before training: nothing to save\n"),
        ("torch", 75, "SIGINT before training: nothing to save\n"),
    ],
)
def test_the_trainer_says_one_line_from_its_first_import_on(module: str, status: int, line: str) -> None:
    result = interrupted_at(module, "pretrain_crnet.py", *CONFIG)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", line)
