"""What a user can do nothing about is silent; a warning that means something is shown."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest

from megatron_crnet.utils.noise import without_memory_lines

REAL = """
import logging, warnings
import megatron_crnet.training.trainer, megatron_crnet.planning.simulation
warnings.warn("a real warning")
logging.getLogger("DeepSpeed").warning("a real record")
"""


@pytest.mark.fault("section-5")
def test_importing_says_nothing_and_real_warnings_are_shown() -> None:
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True)
    shown = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(shown) == 2
    assert any("a real warning" in line for line in shown)
    assert any("a real record" in line for line in shown)


@pytest.mark.fault("section-5")
def test_deepspeeds_lines_of_memory_are_dropped_and_what_else_is_printed_passes() -> None:
    from deepspeed.runtime.utils import see_memory_usage

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with without_memory_lines():
            print("before")
            for words in ("begin bf16_optimizer", "before initializing group 0", "end bf16_ optimizer"):
                see_memory_usage(words, force=True)
            print("MA is a word, too", end="")
        print()
    assert printed.getvalue() == "before\nMA is a word, too\n"


def test_lines_are_whole_again_after_an_error() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with contextlib.suppress(ZeroDivisionError), without_memory_lines():
            print("half a line", end="")
            _ = 1 / 0
        print("x")
    assert printed.getvalue() == "half a linex\n"


AGENT = """
import megatron_crnet
from torch.distributed.run import config_from_args, parse_args
config_from_args(parse_args(["--nproc_per_node=2", "x.py"]))
"""


def test_the_agent_says_nothing_of_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", AGENT], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
