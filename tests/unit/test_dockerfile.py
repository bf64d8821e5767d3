"""The Dockerfile's two targets. That they build and train is tests/image."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "Dockerfile").read_text()


def instructions(stage: str) -> list[str]:
    """The lines of a stage without comments and blank lines."""
    _, _, after = TEXT.partition(f" AS {stage}\n")
    body = re.split(r"^FROM ", after, flags=re.MULTILINE)[0]
    return [line for line in body.splitlines() if line and not line.startswith("#")]


def test_the_targets_differ_in_where_torch_comes_from_alone() -> None:
    cpu, gpu = instructions("cpu"), instructions("gpu")
    assert [line for line in cpu if line not in gpu] == [
        "COPY requirements-torch.txt ./",
        "RUN --mount=type=secret,id=pip.conf"
        " python3 -m pip install --no-cache-dir --requirement requirements-torch.txt",
    ]
    assert [line for line in cpu if line in gpu] == gpu


def test_the_last_target_is_for_gpus_and_its_base_is_pinned() -> None:
    assert re.findall(r"^FROM (.*) AS (.*)$", TEXT, re.MULTILINE) == [
        ("${CPU_BASE_IMAGE}", "cpu"),
        ("${BASE_IMAGE}", "gpu"),
    ]
    defaults = re.findall(r"^ARG \w*BASE_IMAGE=(.*)$", TEXT, re.MULTILINE)
    assert len(defaults) == 2
    assert all(re.search(r":\d+\.\d+", name) for name in defaults)
