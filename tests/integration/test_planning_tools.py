"""tools/plan.py, tools/estimate.py and tools/simulate.py as they are called."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_crnet.config.loading import load_config
from megatron_crnet.reporting.step_identity import identify_step
from tests.integration.conftest import start

CONFIG = ["--config", "examples/quickstart.yaml", "--training.global_batch_size", "8"]


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return start([*options], program=program)


def test_the_file_of_a_plan_is_taken_by_a_dry_run(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    done = run("tools/plan.py", *CONFIG, "--gpus", "1", "--output", str(plan))
    assert done.returncode == 0, done.stderr
    assert "layouts tried" in done.stdout
    assert "layouts" in done.stderr  # progress
    dry = run("pretrain_crnet.py", "--config", str(plan), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "memory of a rank" in dry.stdout
    assert "batch on 1 process (set WORLD_SIZE=N" in dry.stdout


def test_the_estimate_is_printed_as_json() -> None:
    done = run("tools/estimate.py", *CONFIG, "--gpu", "a100-80g", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["fits"] is True
    assert values["seconds"]["step"] > 0
    assert values["kind"] == "estimate"
    assert values["command"].startswith("python tools/estimate.py --config examples/quickstart.yaml")
    assert values["step"] == identify_step(load_config(CONFIG[1], CONFIG[2:]), 1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tools/plan.py", *CONFIG], "add --gpus N"),
        (["tools/plan.py", *CONFIG, "--gpus", "1", "--output", "examples"], "--output examples is a folder"),
        (["tools/simulate.py", *CONFIG, "--world-size", "2", "--rank", "2"], "the ranks of a world of 2 are 0 to 1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command: list[str], message: str) -> None:
    done = run(*command)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
