"""How a tool ends: its errors in one line, Ctrl-C and a closed pipe without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_crnet.utils.errors import ConfigError, reported


def _raise(error: BaseException) -> int:
    raise error


def test_what_a_user_can_mend_is_one_line_and_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(lambda: 7) == 7
    assert reported(lambda: _raise(ConfigError("a\n  b"))) == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(lambda: _raise(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_broken_pipe_of_something_else_is_a_defect() -> None:
    with pytest.raises(BrokenPipeError):
        reported(lambda: _raise(BrokenPipeError()))


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_seen_enough_is_no_traceback(flush: bool) -> None:
    code = f"""
import sys
from megatron_crnet.utils.errors import reported
sys.exit(reported(lambda: print("line " * 100000, flush={flush}) or 0))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
