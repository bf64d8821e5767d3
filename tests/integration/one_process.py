"""Several command lines of the trainer in one process: importing the libraries takes longer than a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from tests.integration.conftest import LIMIT_S, ROOT

DRIVER = """
import contextlib, io, json, os, sys, traceback
import pytest
os.environ.pop("RANK", None)
from megatron_crnet.distributed import cpu_backend
cpu_backend.install()
import deepspeed
import torch.distributed as dist
from megatron.core import parallel_state
from pretrain_crnet import main

for command in json.loads(sys.stdin.read()):
    printed = io.StringIO()
    out, err = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with out, err, pytest.MonkeyPatch.context() as patch:
        exec(command["before"], {"patch": patch})
        try:
            status = main(command["options"])
        except Exception:
            traceback.print_exc()
            status = "traceback"
    parallel_state.destroy_model_parallel()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()
    with open(sys.argv[1], "a") as file:
        print(json.dumps([status, printed.getvalue()]), file=file)
"""


@dataclass(frozen=True)
class Command:
    """One call of `pretrain_crnet.py`.

    Attributes:
        before: Python that is run first, with `patch`, a pytest.MonkeyPatch that lasts for this call.
    """

    options: list[str]
    before: str = ""


@dataclass(frozen=True)
class Printed:
    """What a call gave: its exit status, or `traceback`, and what it printed on both streams."""

    status: int | str
    text: str

    @property
    def error(self) -> str:
        """Its one error line."""
        (line,) = [line for line in self.text.splitlines() if line.startswith("error")]
        return line


def run_commands(results: str | os.PathLike[str], commands: list[Command]) -> list[Printed]:
    """Run them one after the other in a process of their own, without a launcher.

    Args:
        results: a file that does not exist yet.
    """
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(results)],
        input=json.dumps([{"options": command.options, "before": command.before} for command in commands]),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    with open(results) as file:
        found = [Printed(*json.loads(line)) for line in file]
    assert len(found) == len(commands)
    return found
